"""`demo.measure`, and the weights that come with the repository."""

from __future__ import annotations

import pytest
import torch

from demo import measure
from demo.model import ARCHITECTURE, Answer
from export import checkpoint
from export.architecture import InteractiveModel
from tests.conftest import DEMO_CHECKPOINT


@pytest.fixture(scope="module")
def model() -> InteractiveModel:
    return checkpoint.load(DEMO_CHECKPOINT)


def test_the_weights_are_of_the_declared_architecture_and_small(model: InteractiveModel) -> None:
    assert model.architecture == ARCHITECTURE
    assert DEMO_CHECKPOINT.stat().st_size <= 20 * 2**20


def test_every_object_is_prompted_in_every_way(model: InteractiveModel) -> None:
    ious = measure.measure(model, range(2))
    kinds = [measure.CLICK, measure.SINGLE, measure.SECOND, measure.THIRD, measure.BOX]
    assert set(ious) == set(kinds)
    assert len({len(values) for values in ious.values()}) == 1
    assert all(0 <= value <= 1 for values in ious.values() for value in values)


def test_an_unstable_single_mask_gives_way_to_the_best_candidate(model: InteractiveModel) -> None:
    logits = torch.zeros(2, 4, 8, 8)
    logits[0, 0], logits[1, 0] = 5.0, 0.01
    logits[:, 2] = 7.0
    ious = torch.tensor([[0.9, 0.1, 0.8, 0.2]] * 2)
    chosen = measure.single(model, Answer(logits, ious))
    assert (chosen[0] == 5).all()
    assert (chosen[1] == 7).all()
