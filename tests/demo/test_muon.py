"""Muon in FP32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from demo.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape) * 3))
    assert values.max() < 1.3
    assert values.median() > 0.6


def test_a_least_squares_problem_is_solved() -> None:
    torch.manual_seed(0)
    inputs, wanted = torch.randn(256, 16), torch.randn(8, 16)
    weight = nn.Parameter(torch.zeros(8, 16))
    optimiser = Muon([weight], lr=0.1)
    for step in range(200):
        loss = (inputs @ (weight - wanted).T).square().mean()
        optimiser.param_groups[0]["lr"] = 0.1 * (1 - step / 200)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert (weight - wanted).abs().max() < 0.05


def test_a_matrix_without_a_gradient_is_left_alone() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    Muon([weight], lr=1.0).step()
    assert torch.equal(weight, torch.ones(2, 2))
