"""Meta's predictor as a peer to be timed: the same masks as unchanged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sam3.perflib.connected_components import connected_components_cpu_single

from benchmarks.reference import components


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_components_are_metas(share: float) -> None:
    mask = torch.from_numpy(np.random.default_rng(0).random((40, 50)) < share)
    for ours, metas in zip(components(mask), connected_components_cpu_single(mask), strict=True):
        assert torch.equal(ours, metas)
