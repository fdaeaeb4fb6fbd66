"""Objects of several jobs as the program takes them: which image, which mask, where in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from jobs import Job
from launches import LaunchInputs, gather, stack_masks

from tests.model_repository.sam3_prompt_decoder.test_decoder import CPU, OBJECTS, features, prompt

GPU = torch.device("cuda:0")


@pytest.mark.parametrize("keep", [True, False])
def test_stacked_images_have_the_memory_layout_of_kept_ones(keep: bool) -> None:
    """Channels last: otherwise each decode of several images would rearrange every pixel."""
    images = [features(seed) for seed in (1, 2)]
    jobs = [Job(image.kept_copy() if keep else image, OBJECTS[:1]) for image in images]
    together = gather(LaunchInputs.from_jobs(jobs, [(0, 0), (1, 0)]))
    for stacked, *singles in zip(together, *images, strict=True):
        assert stacked.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(stacked, torch.stack(singles))


def test_objects_of_one_image_share_it_without_a_copy() -> None:
    job = Job(features(1), [prompt([1], seed=n) for n in range(3)])
    together = gather(LaunchInputs.from_jobs([job], [(0, 0), (0, 2)]))
    for expanded, own in zip(together, job.features, strict=True):
        assert expanded.data_ptr() == own.data_ptr()
        assert expanded.shape == (2, *own.shape)


def test_masks_belong_to_the_objects_that_have_them() -> None:
    jobs = [Job(features(n), [prompt([1], mask=n or None, seed=n)]) for n in range(3)]
    inputs = LaunchInputs.from_jobs(jobs, [(2, 0), (0, 0), (1, 0)])
    assert inputs.shape == (3, 2, 2)
    given = inputs.tensors(CPU)
    assert given["mask_index"].tolist() == [0, 2]
    for row, n in ((0, 2), (1, 1)):
        mask = jobs[n].objects[0].mask
        assert mask is not None
        assert torch.equal(given["mask_input"][row], mask)
    for row, n in enumerate((2, 0, 1)):
        assert torch.equal(given["image_embed"][row], jobs[n].features.image_embed)
        assert torch.equal(given["point_coords"][row], torch.from_numpy(jobs[n].objects[0].coords))


def test_masks_in_host_memory_are_copied_to_a_gpu_in_one_page_locked_piece(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But not if one of them is on the GPU already."""
    pieces: list[torch.Tensor] = []
    locked: list[bool] = []
    empty = torch.empty

    def made(*shape: Any, **options: Any) -> torch.Tensor:
        locked.append(options.pop("pin_memory"))
        return empty(*shape, **options)

    def sent(_: torch.device, tensor: torch.Tensor) -> torch.Tensor:
        pieces.append(tensor)
        return tensor

    masks = [torch.rand(4, 4).half() for _ in range(3)]
    monkeypatch.setattr("launches._on", sent)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", made)
        assert torch.equal(stack_masks(masks, GPU), torch.stack(masks))
    assert (len(pieces), locked) == (1, [True])
    stack_masks([masks[0].to("meta")] * 2, GPU)
    assert len(pieces) == 3
