"""Narrower encoders: which are within the gate, and which cannot run here."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import artifacts, variants
from benchmarks.accuracy import GATE_TRAINED
from export.check import Features
from tests.conftest import DEMO_CHECKPOINT


def test_each_variant_is_judged_by_its_masks_or_says_why_not(
    monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    def broken(build: variants.Build, folder: Path) -> variants.Run:
        raise ImportError("No module named 'openvino'")

    def slow(build: variants.Build, folder: Path) -> variants.Run:
        run = variants.fp32(build, folder)

        def wait_and_run(image: NDArray[np.uint8]) -> Features:
            time.sleep(0.5)
            return run(image)

        return wait_and_run

    chosen = {
        variants.REFERENCE: variants.fp32,
        "int8": variants.int8,
        "slow": slow,
        "another": broken,
    }
    demo = artifacts.Artifacts("demo", DEMO_CHECKPOINT, repository)
    monkeypatch.setattr(artifacts, "demo", lambda: demo)
    monkeypatch.setattr(artifacts, "full_size", lambda: demo)
    monkeypatch.setattr(variants, "VARIANTS", chosen)
    monkeypatch.setattr(variants, "ROUNDS", 1)
    monkeypatch.setattr(variants, "FULL_SIZE_ROUNDS", 1)
    reference, int8, slower, another = variants.measure()
    assert reference[1:3] == slower[1:3]
    assert float(reference[1]) > 0.9995
    assert reference[2] == "within"
    assert float(int8[1]) < GATE_TRAINED
    assert int8[2] == "missed"
    assert all(float(ratio) > 2 for ratio in slower[3:])
    assert another[1:3] == ("not measured", "ImportError: No module named 'openvino'")
