"""Figures: measured values next to their targets, as a table and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from benchmarks.timing import Sample


@dataclass(frozen=True)
class Target:
    """What a figure must reach, and what it should."""

    must: float
    aim: float
    more_is_better: bool = False

    def verdict(self, value: float) -> str:
        """Which of the two is met, in words, or by how much the lesser one is missed."""
        if self._reaches(value, self.aim):
            return "aim met"
        if self._reaches(value, self.must):
            return "must met"
        return f"missed by {abs(value / self.must - 1):.0%}"

    def _reaches(self, value: float, goal: float) -> bool:
        return value >= goal if self.more_is_better else value <= goal


@dataclass(frozen=True)
class Figure:
    """One line of the results.

    `sample` is None if it could not be measured; `note` then says why. Otherwise `note` may hold
    whatever else the reader should know.
    """

    name: str
    unit: str
    sample: Sample | None
    target: Target | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.sample is None and not self.note:
            raise ValueError(f"{self.name}: say why it was not measured")

    @property
    def verdict(self) -> str:
        if self.sample is None:
            return "not measured"
        return self.target.verdict(self.sample.median) if self.target else ""

    def cells(self) -> tuple[str, ...]:
        """Name, measured value with its spread, must, aim, verdict, note."""
        must, aim = (
            (quantity(self.target.must, self.unit), quantity(self.target.aim, self.unit))
            if self.target
            else ("", "")
        )
        return self.name, self._measured(), must, aim, self.verdict, self.note

    def _measured(self) -> str:
        if self.sample is None:
            return "—"
        value = quantity(self.sample.median, self.unit)
        if len(self.sample.values) == 1:
            return value
        low, high = (quantity(v, self.unit) for v in (self.sample.low, self.sample.high))
        return f"{value} ({low} to {high})"


@dataclass(frozen=True)
class FigureSpec:
    """A figure to be measured, whether or not that succeeds."""

    name: str
    unit: str
    target: Target | None = None

    def measured(self, sample: Sample, note: str = "") -> Figure:
        return Figure(self.name, self.unit, sample, self.target, note)

    def missing(self, reason: str) -> Figure:
        return Figure(self.name, self.unit, None, self.target, reason)


HEADER = ("figure", "measured, median (quartiles)", "must", "aim", "verdict", "note")


def quantity(value: float, unit: str) -> str:
    """Format with three significant digits and a unit; ratios far below one as 1/n."""
    if unit == "ratio":
        return f"1/{1 / value:.0f}" if 0 < value < 0.02 else f"{value:.2f}"
    digits = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{digits} {unit}".strip()


def reason(error: Exception) -> str:
    """Why something could not be measured, in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def rich_table(title: str, figures: Sequence[Figure]) -> Table:
    table = Table(*HEADER, title=title, title_justify="left")
    for figure in figures:
        verdict = figure.verdict
        style = "red" if verdict.startswith("missed") else "green" if "met" in verdict else None
        table.add_row(*map(escape, figure.cells()), style=style)
    return table


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub-flavoured Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in r) + " |" for r in lines
    )


def figures_markdown(figures: Sequence[Figure]) -> str:
    return markdown_table(HEADER, [figure.cells() for figure in figures])
