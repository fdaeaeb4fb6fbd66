"""The inputs of one launch: objects of several jobs that the program decodes together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jobs import Job, Launch
from numpy.typing import NDArray
from store import Features
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """Of N objects with T tokens each, K of which refine an earlier mask."""

    images: Sequence[Features]
    """Each object's; one and the same where objects share it."""
    coords: NDArray[np.float32]
    """[N, T, 2]"""
    labels: NDArray[np.int32]
    """[N, T]"""
    masks: Sequence[Tensor]
    """K of [M, M], on whatever device."""
    mask_rows: Sequence[int]
    """The objects that they belong to."""

    @classmethod
    def of(cls, jobs: Sequence[Job], launch: Launch) -> Inputs:
        prompts = [jobs[j].objects[n] for j, n in launch]
        masks = [(row, p.mask) for row, p in enumerate(prompts) if p.mask is not None]
        return cls(
            [jobs[j].features for j, _ in launch],
            np.stack([prompt.coords for prompt in prompts]),
            np.stack([prompt.labels for prompt in prompts]),
            [mask for _, mask in masks],
            [row for row, _ in masks],
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """N, T, K."""
        objects, tokens = self.labels.shape
        return objects, tokens, len(self.masks)

    @property
    def shared_image(self) -> Features | None:
        """The image of all objects, if they have one."""
        first = self.images[0]
        return first if all(image is first for image in self.images) else None

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """As the program takes them (export/decoder.py)."""
        size = self.images[0].high_res_feats_0.shape[-1]
        return {
            **gather(self)._asdict(),
            "point_coords": _array_on(device, self.coords),
            "point_labels": _array_on(device, self.labels),
            "mask_input": stack_masks(self.masks, device).float()
            if self.masks
            else torch.empty((0, size, size), device=device),
            "mask_index": _array_on(device, np.array(self.mask_rows, dtype=np.int64)),
        }


def gather(inputs: Inputs) -> Features:
    """One embedding per object, [N, C, H, W] each; objects of one image share it without a copy.

    FP16 ones stay so: the program adds them to FP32, which gives the sums that FP32 ones would.
    """
    shared = inputs.shared_image
    if shared is not None:
        return Features(*(t.expand(len(inputs.images), *t.shape) for t in shared))
    return Features(*map(stack, zip(*inputs.images, strict=True)))


def stack(images: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """[C, H, W] each → [N, C, H, W], in memory with channels last, as kept images are."""
    room = None if out is None else out.permute(0, 2, 3, 1)
    return torch.stack([image.permute(1, 2, 0) for image in images], out=room).permute(0, 3, 1, 2)


def stack_masks(masks: Sequence[Tensor], device: torch.device) -> Tensor:
    """[M, M] each, on whatever device → [K, M, M] on this one, which is not waited for."""
    if device.type == "cpu" or not all(mask.is_cpu for mask in masks):
        return torch.stack([_on(device, mask) for mask in masks])
    # Of memory that is not page-locked, the driver waits for the stream before it copies so much.
    shape = (len(masks), *masks[0].shape)
    room = torch.empty(shape, dtype=masks[0].dtype, pin_memory=True)
    return _on(device, torch.stack(list(masks), out=room))


def _array_on(device: torch.device, array: NDArray[Any]) -> Tensor:
    return _on(device, torch.from_numpy(array))


def _on(device: torch.device, tensor: Tensor) -> Tensor:
    """On the device, which is not waited for: what it still does is of earlier launches."""
    return tensor.to(device, non_blocking=True)
