"""Objects of several jobs as the program takes them: which image, which mask, where in memory."""

from __future__ import annotations

import pytest
import torch
from jobs import Job
from launches import Inputs, gather

from tests.model_repository.sam3_prompt_decoder.test_decoder import CPU, OBJECTS, features, prompt


@pytest.mark.parametrize("keep", [True, False])
def test_images_together_lie_as_kept_ones_do(keep: bool) -> None:
    """With channels last: else each decode of several would put every pixel in its place anew."""
    images = [features(seed) for seed in (1, 2)]
    jobs = [Job(image.own() if keep else image, OBJECTS[:1]) for image in images]
    together = gather(Inputs.of(jobs, [(0, 0), (1, 0)]))
    for stacked, *singles in zip(together, *images, strict=True):
        assert stacked.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(stacked, torch.stack(singles))


def test_objects_of_one_image_share_it_without_a_copy() -> None:
    job = Job(features(1), [prompt([1], seed=n) for n in range(3)])
    together = gather(Inputs.of([job], [(0, 0), (0, 2)]))
    for expanded, own in zip(together, job.features, strict=True):
        assert expanded.data_ptr() == own.data_ptr()
        assert expanded.shape == (2, *own.shape)


def test_masks_go_with_the_objects_that_have_them() -> None:
    jobs = [Job(features(n), [prompt([1], mask=n or None, seed=n)]) for n in range(3)]
    inputs = Inputs.of(jobs, [(2, 0), (0, 0), (1, 0)])
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
