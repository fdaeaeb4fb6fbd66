"""How a failure affects a benchmark run."""

from __future__ import annotations

from benchmarks.figures import FigureSpec, Target
from benchmarks.findings import Findings
from benchmarks.timing import Sample

ENCODE = FigureSpec("encode", "ms", Target(12, 10))
CLICK = FigureSpec("click", "ms")
CLICKS = FigureSpec("clicks per second", "1/s", Target(2000, 8000, more_is_better=True))


def test_a_failure_costs_only_its_own_figures_and_each_is_reported() -> None:
    messages: list[str] = []
    found = Findings(messages.append)

    def fails_half_way() -> None:
        found.add(ENCODE.measured(Sample((9.0,))))
        raise FileNotFoundError("no tritonserver")

    found.collect([CLICK, ENCODE], fails_half_way)
    found.collect([CLICKS], lambda: found.add(CLICKS.measured(Sample((100.0,)))))
    verdicts = [figure.verdict for figure in found.figures]
    assert verdicts == ["aim met", "not measured", "missed by 95%"]
    assert messages == [
        "encode: 9 ms, aim met",
        "click: —, not measured, FileNotFoundError: no tritonserver",
        "clicks per second: 100 1/s, missed by 95%",
    ]


def test_a_figure_that_was_never_reported_is_listed_too() -> None:
    found = Findings(lambda _: None)
    found.collect([CLICK], lambda: None)
    assert [figure.verdict for figure in found.figures] == ["not measured"]
