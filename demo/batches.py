"""Training batches: rotated and recoloured pictures, some of their objects, and their prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from demo import prompts
from demo.model import ARCHITECTURE, Answer, Prompts, normalise
from demo.pictures import Pictures
from export.architecture import Architecture

BOX_ERROR = 0.06
"""Maximum error of a drawn corner, as a share of the box's side."""


@dataclass(frozen=True)
class Objects:
    """N objects of a batch of pictures."""

    owner: Tensor
    """INT64 [N]: the index of each object's picture."""
    clicks: Tensor
    """FP32 [N, 1, 2]: x, y of a pixel of the object, in input pixels."""
    boxes: Tensor
    """FP32 [N, 2, 2]: x, y of the corners of its box, drawn imprecisely."""
    truth: Tensor
    """FP32 [N, M, M]: the share of each cell that the object covers."""

    def __getitem__(self, index: Tensor | slice) -> Objects:
        return Objects(self.owner[index], self.clicks[index], self.boxes[index], self.truth[index])

    def __len__(self) -> int:
        return len(self.owner)

    def points(self) -> Prompts:
        """One positive click on each object."""
        return Prompts(self.clicks, torch.ones(len(self), 1, dtype=torch.int32))

    def drawn_boxes(self) -> Prompts:
        """One box around each object."""
        return Prompts.from_boxes(self.boxes)


def batches(
    pictures: Pictures, sizes: Architecture, count: int, objects: int, rng: np.random.Generator
) -> Iterator[tuple[Tensor, Objects]]:
    """Endless batches: FP32 [B, 3, S, S], and `objects` of each of B = `count` pictures.

    Objects are interleaved: one of every picture, then another of every picture, and so on. A
    picture with fewer objects repeats them.
    """
    while True:
        images, labels = pictures.batch(rng.integers(len(pictures), size=count))
        images, labels = _rotate(images, labels, rng)
        images = images[..., rng.permutation(3)]
        chosen = [
            _object(owner, labels[owner] == number, sizes, rng)
            for owner, number in _deal(labels, objects, rng)
        ]
        owner, clicks, boxes, truth = (list(column) for column in zip(*chosen, strict=True))
        yield (
            normalise(torch.from_numpy(_scaled(images, sizes.image_size))),
            Objects(
                torch.tensor(owner),
                torch.tensor(np.stack(clicks), dtype=torch.float32)[:, None],
                torch.tensor(np.stack(boxes), dtype=torch.float32),
                torch.from_numpy(np.stack(truth)),
            ),
        )


def correct(answer: Answer, asked: Prompts, objects: Objects, rng: np.random.Generator) -> Prompts:
    """Add one click where each answer is wrong, and the answer itself as the mask prompt."""
    chosen = answer.best if rng.random() < 0.7 else torch.zeros_like(answer.best)
    logits = answer.candidate(chosen).detach()
    scale = ARCHITECTURE.image_size / ARCHITECTURE.mask_size  # pixels in a cell, at every size
    clicks, labels = [], []
    for predicted, truth in zip((logits > 0).numpy(), (objects.truth > 0.5).numpy(), strict=True):
        region, missing = prompts.correction(predicted, truth)
        x, y = _click(region if region.any() else ~region, rng)
        clicks.append(((x + 0.5) * scale - 0.5, (y + 0.5) * scale - 0.5))
        labels.append(int(missing))
    return asked.corrected(torch.tensor(clicks), torch.tensor(labels, dtype=torch.int32), logits)


def _rotate(
    images: NDArray[np.uint8], labels: NDArray[np.uint8], rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Rotate and mirror a batch by one of the square's eight symmetries."""
    quarter, mirror = int(rng.integers(4)), rng.random() < 0.5
    images, labels = (np.rot90(a, quarter, (1, 2)) for a in (images, labels))
    return (images[:, ::-1], labels[:, ::-1]) if mirror else (images, labels)


def _deal(
    labels: NDArray[np.uint8], count: int, rng: np.random.Generator
) -> Iterator[tuple[int, int]]:
    """Go through the pictures `count` times: picture and object number, repeating if necessary."""
    orders = []
    for picture in labels:
        numbers = rng.permutation(int(picture.max())) + 1
        orders.append(np.resize(numbers, count))
    for turn in range(count):
        for owner, order in enumerate(orders):
            yield owner, int(order[turn])


def _scaled(images: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    if images.shape[1] == side:
        return np.ascontiguousarray(images)
    area = cv2.INTER_AREA
    shrunk = [cv2.resize(np.ascontiguousarray(i), (side, side), interpolation=area) for i in images]
    return np.stack(shrunk)


def _object(
    owner: int, mask: prompts.Mask, sizes: Architecture, rng: np.random.Generator
) -> tuple[int, NDArray[np.float64], NDArray[np.float64], NDArray[np.float32]]:
    """Picture, click, box and truth of one object, scaled to the model's sizes."""
    grid = (sizes.mask_size, sizes.mask_size)
    truth = cv2.resize(mask.astype(np.float32), grid, interpolation=cv2.INTER_AREA)
    scale = sizes.image_size / len(mask)
    x0, y0, x1, y1 = prompts.box(mask)
    error = rng.uniform(-BOX_ERROR, BOX_ERROR, (2, 2)) * (x1 - x0, y1 - y0)
    corners = np.clip(np.array([[x0, y0], [x1, y1]]) + error, 0, len(mask))
    return owner, (np.array(_click(mask, rng)) + 0.5) * scale - 0.5, corners * scale, truth


def _click(mask: prompts.Mask, rng: np.random.Generator) -> prompts.Point:
    return prompts.interior(mask) if rng.random() < 0.5 else prompts.anywhere(mask, rng)
