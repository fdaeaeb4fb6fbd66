"""python -m benchmarks.semantics: what a request means, rule by rule, each checked against a
reference other than our own code; as a table.

A rule is a test marked `semantic(area, rule, reading)`: this runs only those tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

import pytest
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.environment import ROOT, provenance
from benchmarks.figures import markdown_table
from benchmarks.results import write_section

SECTION = "semantics"
COLUMNS = ("", "rule", "checked against", "checks", "")


@dataclass(frozen=True)
class Rule:
    """What must hold, and what it is checked against other than our own code."""

    area: str
    text: str
    reading: str


@dataclass
class Outcome:
    """The outcomes of one rule's checks."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    @property
    def verdict(self) -> str:
        """`fail` if any check failed, `not run` if one was skipped or none ran, else `pass`."""
        if self.failed:
            return "**fail**"
        return "pass" if self.passed and not self.skipped else "not run"

    def count(self, outcome: str) -> None:
        setattr(self, outcome, getattr(self, outcome) + 1)


@dataclass(eq=False)  # pytest keeps plugins in sets
class Collector:
    """A pytest plugin that adds up the outcomes of marked tests by their rules."""

    outcomes: dict[Rule, Outcome] = field(default_factory=dict)
    _rules: dict[str, Rule] = field(default_factory=dict)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Record each test's rule, in the order of the table."""
        for item in session.items:
            for mark in item.iter_markers("semantic"):
                rule = Rule(*mark.args)
                self._rules[item.nodeid] = rule
                self.outcomes.setdefault(rule, Outcome())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count the call, or the setup that prevented it."""
        rule = self._rules.get(report.nodeid)
        if rule and (report.when == "call" or not report.passed):
            self.outcomes[rule].count(report.outcome)

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Area, rule, reading, number of checks, verdict; grouped by area."""
        areas = list(dict.fromkeys(rule.area for rule in self.outcomes))
        for rule, outcome in sorted(
            self.outcomes.items(), key=lambda entry: areas.index(entry[0].area)
        ):
            checks = outcome.passed + outcome.failed + outcome.skipped
            yield rule.area, rule.text, rule.reading, str(checks), outcome.verdict


def markdown(rows: list[tuple[str, ...]], origin: str) -> str:
    """The section of RESULTS.md."""
    passed = sum(row[-1] == "pass" for row in rows)
    return (
        "## What a request means, rule by rule\n\n"
        f"{origin}\n\n"
        f"{passed} of {len(rows)} rules pass. Every check that involves a server runs against the "
        "real tritonserver.\n\n"
        f"{markdown_table(COLUMNS, rows)}"
    )


def main(
    write: Annotated[bool, typer.Option(help="Rewrite the section of RESULTS.md.")] = True,
) -> None:
    """Check every rule of interactive segmentation and print the table; status 1 if one fails.

    The rules at SAM 3's own size take many minutes.
    """
    origin = provenance("python -m benchmarks.semantics").markdown()
    collector = Collector()
    arguments = ["-q", "--disable-warnings", "-m", "semantic", str(ROOT / "tests")]
    pytest.main(arguments, plugins=[collector])
    rows = list(collector.rows())
    table = Table(*COLUMNS, title="what a request means")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if write:
        write_section(SECTION, markdown(rows, origin))
    if not rows or any(row[-1] != "pass" for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
