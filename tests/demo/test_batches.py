"""Training batches: pictures, masks and prompts are rotated and scaled alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from demo.batches import BOX_ERROR, Objects, batches, correct
from demo.model import Answer, sized
from demo.pictures import Pictures
from demo.scenes import generate
from export.architecture import LOGIT_LIMIT

SIZE = 112


@pytest.fixture(scope="module")
def shown() -> Pictures:
    scenes = [generate(seed, 2 * SIZE) for seed in range(6)]
    return Pictures([np.stack([s.image for s in scenes])], [np.stack([s.labels for s in scenes])])


@pytest.fixture(scope="module")
def batch(shown: Pictures) -> tuple[torch.Tensor, Objects]:
    return next(batches(shown, sized(SIZE), 4, 5, np.random.default_rng(0)))


def test_a_batch_has_the_model_s_sizes(batch: tuple[torch.Tensor, Objects]) -> None:
    images, objects = batch
    side = sized(SIZE).mask_size
    assert images.shape == (4, 3, SIZE, SIZE)
    assert objects.truth.shape == (20, side, side)
    assert objects.points().coords.shape == (20, 1, 2)
    assert objects.drawn_boxes().labels.tolist() == [[2, 3]] * 20


def test_objects_take_turns(batch: tuple[torch.Tensor, Objects]) -> None:
    assert batch[1].owner.tolist() == [0, 1, 2, 3] * 5


def test_a_click_lies_in_its_object(batch: tuple[torch.Tensor, Objects]) -> None:
    objects = batch[1]
    cell = SIZE / objects.truth.shape[-1]
    x, y = ((objects.clicks[:, 0] + 0.5) / cell).long().unbind(1)
    covered = objects.truth[torch.arange(len(objects)), y, x]
    assert (covered > 0).float().mean() > 0.95


def test_a_box_is_nearly_tight(batch: tuple[torch.Tensor, Objects]) -> None:
    objects = batch[1]
    cell = SIZE / objects.truth.shape[-1]
    for (start, end), truth in zip(objects.boxes, objects.truth, strict=True):
        ys, xs = torch.nonzero(truth > 0.3, as_tuple=True)
        if not len(xs):
            continue
        slack = 2 * cell + BOX_ERROR * (end - start)
        tight_start = torch.stack([xs.min(), ys.min()]) * cell
        tight_end = torch.stack([xs.max() + 1, ys.max() + 1]) * cell
        assert ((start - tight_start).abs() <= slack).all()
        assert ((end - tight_end).abs() <= slack).all()


def test_a_correction_clicks_on_the_error_and_passes_the_mask_back(
    batch: tuple[torch.Tensor, Objects],
) -> None:
    objects = batch[1]
    nothing = -50 * torch.ones(len(objects), 4, *objects.truth.shape[1:])
    answer = Answer(nothing, torch.zeros(len(objects), 4))
    corrected = correct(answer, objects.points(), objects, np.random.default_rng(0))
    assert corrected.coords.shape == (20, 2, 2)
    assert (corrected.labels == 1).all()
    assert corrected.masks is not None
    assert corrected.masks.min() == -LOGIT_LIMIT
    cell = SIZE / objects.truth.shape[-1]
    x, y = ((corrected.coords[:, 1] + 0.5) / cell).long().unbind(1)
    inside = objects.truth[torch.arange(len(objects)), y, x] > 0.5
    large = (objects.truth > 0.5).sum((1, 2)) > 0
    assert inside[large].all()


def test_superfluous_pixels_are_corrected_by_a_negative_click(
    batch: tuple[torch.Tensor, Objects],
) -> None:
    objects = batch[1]
    everything = 5 * torch.ones(len(objects), 4, *objects.truth.shape[1:])
    answer = Answer(everything, torch.zeros(len(objects), 4))
    corrected = correct(answer, objects.drawn_boxes(), objects, np.random.default_rng(0))
    assert corrected.labels.tolist() == [[2, 3, 0]] * 20
