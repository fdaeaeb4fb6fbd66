"""The inputs of one launch: objects of one or more jobs that the program decodes together."""

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
class LaunchInputs:
    """Inputs of N objects with T tokens each, K of which refine an earlier mask."""

    images: Sequence[Features]
    """Each object's image; objects that share one have the same `Features` instance."""
    coords: NDArray[np.float32]
    """[N, T, 2]"""
    labels: NDArray[np.int32]
    """[N, T]"""
    masks: Sequence[Tensor]
    """K masks [M, M], on any device."""
    mask_rows: Sequence[int]
    """The object that each mask belongs to."""

    @classmethod
    def from_jobs(cls, jobs: Sequence[Job], launch: Launch) -> LaunchInputs:
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
        """The image that all objects share, if they do."""
        first = self.images[0]
        return first if all(image is first for image in self.images) else None

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """The inputs as the program takes them (export/decoder.py)."""
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


def gather(inputs: LaunchInputs) -> Features:
    """One embedding per object, [N, C, H, W] each; objects of one image share it without a copy.

    FP16 embeddings stay FP16: the program adds them to FP32 values, so the sums are the same as
    with FP32 embeddings.
    """
    shared = inputs.shared_image
    if shared is not None:
        return Features(*(t.expand(len(inputs.images), *t.shape) for t in shared))
    return Features(*map(stack, zip(*inputs.images, strict=True)))


def stack(images: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """[C, H, W] each → [N, C, H, W], channels last in memory, like kept images."""
    buffer = None if out is None else out.permute(0, 2, 3, 1)
    return torch.stack([image.permute(1, 2, 0) for image in images], out=buffer).permute(0, 3, 1, 2)


def stack_masks(masks: Sequence[Tensor], device: torch.device) -> Tensor:
    """[M, M] each, on any device → [K, M, M] on this device, without waiting for it."""
    if device.type == "cpu" or not all(mask.is_cpu for mask in masks):
        return torch.stack([_on(device, mask) for mask in masks])
    # From memory that is not page-locked, the driver waits for the stream before copying this much.
    shape = (len(masks), *masks[0].shape)
    buffer = torch.empty(shape, dtype=masks[0].dtype, pin_memory=True)
    return _on(device, torch.stack(list(masks), out=buffer))


def _array_on(device: torch.device, array: NDArray[Any]) -> Tensor:
    return _on(device, torch.from_numpy(array))


def _on(device: torch.device, tensor: Tensor) -> Tensor:
    """The tensor on the device, without waiting for it: it may be busy with earlier launches."""
    return tensor.to(device, non_blocking=True)
