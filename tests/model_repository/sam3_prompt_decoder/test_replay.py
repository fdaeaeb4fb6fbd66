"""What is replayed and what is not; replaying itself needs a GPU (test_gpu.py)."""

from __future__ import annotations

import pytest
import torch
from replay import MAX_TOKENS, ClickReplay
from torch import Tensor


@pytest.mark.parametrize("shape", [(2, 3), (1, MAX_TOKENS + 1), (64, 2)])
def test_what_is_no_click_runs_as_it_is(shape: tuple[int, int]) -> None:
    def program(**inputs: Tensor) -> tuple[Tensor, Tensor]:
        return inputs["point_labels"], inputs["image_embed"]

    given = {"point_labels": torch.ones(shape), "image_embed": torch.zeros(shape[0], 1)}
    labels, embed = ClickReplay(program)(**given)
    assert labels is given["point_labels"]
    assert embed is given["image_embed"]


def test_once_closed_a_click_of_another_shape_runs_as_it_is() -> None:
    replay = ClickReplay(lambda **inputs: (inputs["point_labels"], inputs["point_labels"]))
    replay.records = False
    given = torch.ones(1, 2)
    labels, _ = replay(point_labels=given)
    assert labels is given
