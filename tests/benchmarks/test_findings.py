"""What one failure costs a run of the benchmark."""

from __future__ import annotations

from benchmarks.figures import Asked, Target
from benchmarks.findings import Findings
from benchmarks.timing import Sample

ENCODE = Asked("encode", "ms", Target(12, 10))
CLICK = Asked("click", "ms")


def test_what_fails_takes_only_its_own_figures_away_and_each_is_told() -> None:
    told: list[str] = []
    found = Findings(told.append)

    def fails_half_way() -> None:
        found.add(ENCODE.measured(Sample((9.0,))))
        raise FileNotFoundError("no tritonserver")

    found.collect([CLICK, ENCODE], fails_half_way)
    assert [figure.verdict for figure in found.figures] == ["aim met", "not measured"]
    assert told == [
        "encode: 9 ms, aim met",
        "click: —, not measured, FileNotFoundError: no tritonserver",
    ]


def test_a_figure_that_was_forgotten_is_listed_too() -> None:
    found = Findings(lambda _: None)
    found.collect([CLICK], lambda: None)
    assert [figure.verdict for figure in found.figures] == ["not measured"]
