"""Narrower encoders: which are within the gate, and which cannot run here."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import artifacts, variants
from benchmarks.accuracy import GATE_TRAINED
from tests.conftest import DEMO_CHECKPOINT


def test_each_variant_is_judged_by_its_masks_or_says_why_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, repository: Path
) -> None:
    def broken(_: Path) -> variants.Run:
        raise ImportError("No module named 'openvino'")

    chosen = {variants.REFERENCE: variants.fp32, "int8": variants.int8, "another": broken}
    demo = artifacts.Artifacts("demo", DEMO_CHECKPOINT, repository)
    monkeypatch.setattr(artifacts, "demo", lambda: demo)
    monkeypatch.setattr(variants, "VARIANTS", chosen)
    monkeypatch.setattr(variants, "ROUNDS", 1)
    reference, int8, another = variants.measure(tmp_path)
    assert reference[1:] == ("1.0000", "within", "1.00")
    assert float(int8[1]) < GATE_TRAINED
    assert int8[2] == "missed"
    assert another[1:3] == ("not measured", "ImportError: No module named 'openvino'")
