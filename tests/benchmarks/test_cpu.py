"""How the CPU benchmark evaluates its measurements."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from benchmarks import artifacts, cpu, growth
from benchmarks.findings import Findings
from benchmarks.stage import EMBEDDINGS, IN_PROCESS, OURS
from benchmarks.timing import Sample


def test_our_first_mask_is_a_one_shot_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others encode and then click."""
    clicks = {OURS: Sample((0.1,)), EMBEDDINGS: Sample((0.3,)), IN_PROCESS: Sample((0.2,))}
    measured = SimpleNamespace(
        clicks=lambda *_, **__: clicks,
        boxes_together=lambda *_, **__: Sample((1.0,)),
        ONE_SHOT="one-shot",
        encoding=lambda *_: {
            OURS: Sample((10.0,)),
            IN_PROCESS: Sample((20.0,)),
            "one-shot": Sample((7.0,)),
        },
    )
    monkeypatch.setattr(cpu, "measures", measured)
    monkeypatch.setattr(cpu, "stage", lambda *_, **__: nullcontext())
    monkeypatch.setattr(artifacts, "full_size", lambda **_: None)
    monkeypatch.setattr(growth, "objects", lambda *_, **__: None)
    found = Findings(lambda _: None)
    cpu._full_size(found)
    (comparison,) = found.comparisons
    firsts = {name: sample.median for name, sample in comparison.first_masks.items()}
    assert firsts == {OURS: 7.0, EMBEDDINGS: 10.3, IN_PROCESS: 20.2}
