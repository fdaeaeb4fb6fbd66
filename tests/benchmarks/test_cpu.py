"""How the CPU benchmark evaluates its measurements."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from benchmarks import artifacts, cpu, growth
from benchmarks.findings import Findings
from benchmarks.stage import EMBEDDINGS, IN_PROCESS, OURS
from benchmarks.timing import Sample


def test_figures_are_ours_by_theirs_and_our_first_mask_is_a_one_shot_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The others encode and then click."""
    clicks = {OURS: Sample((0.1,)), EMBEDDINGS: Sample((0.3,)), IN_PROCESS: Sample((0.2,))}
    measured = SimpleNamespace(
        clicks=lambda *_, **__: clicks,
        boxes_together=lambda *_, **__: Sample((1.0,)),
        ONE_SHOT="one-shot",
        CLICK="click",
        encoding=lambda *_: {
            OURS: Sample((10.0,)),
            IN_PROCESS: Sample((20.0,)),
            "one-shot": Sample((7.0,)),
            "click": Sample((0.07,)),
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
    figures = {figure.name: figure.sample for figure in found.figures}
    assert {name: sample and sample.median for name, sample in figures.items()} == {
        cpu.ENCODE.name: 0.5,
        cpu.FASTEST.name: 0.5,
        cpu.CLICK.name: 0.5,
        cpu.CLICK_OR_ONE_SHOT.name: pytest.approx(0.01),
        cpu.BOXES.name: 1.0,
    }


def test_a_crowds_figure_is_how_much_more_it_clicks_than_one_caller() -> None:
    found = Findings(lambda _: None)
    cpu._add_crowd(found, {1: Sample((10.0, 20.0, 30.0)), 16: Sample((30.0, 50.0, 60.0))})
    (figure,) = found.figures
    assert figure.name == cpu.CROWD.name
    assert figure.sample is not None and figure.sample.median == 2.5
