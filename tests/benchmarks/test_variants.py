"""Narrower encoders: who is within the gate, and what cannot be run here."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import variants
from benchmarks.accuracy import GATE_TRAINED


def test_each_variant_is_judged_by_its_masks_or_says_why_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(_: Path) -> variants.Run:
        raise ImportError("No module named 'openvino'")

    chosen = {variants.REFERENCE: variants.fp32, "int8": variants.int8, "another": broken}
    monkeypatch.setattr(variants, "VARIANTS", chosen)
    monkeypatch.setattr(variants, "ROUNDS", 1)
    reference, int8, another = variants.measure(tmp_path)
    assert reference[1:] == ("1.0000", "within", "1.00")
    assert float(int8[1]) < GATE_TRAINED
    assert int8[2] == "missed"
    assert another[1:3] == ("not measured", "ImportError: No module named 'openvino'")
