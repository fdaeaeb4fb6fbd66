"""The semantics table: what counts as passed, and that the marked tests are found."""

from __future__ import annotations

import pytest

from benchmarks.semantics import Collector, Outcome, markdown

pytest_plugins = ["pytester"]

TESTS = """
import pytest

@pytest.mark.semantic("area", "holds", "arithmetic")
@pytest.mark.parametrize("n", [1, 2])
def test_holds(n): assert n

@pytest.mark.semantic("other", "holds at times", "arithmetic")
@pytest.mark.parametrize("n", [0, 1])
def test_fails(n): assert n

@pytest.fixture
def broken(): raise OSError

@pytest.mark.semantic("area", "cannot be asked", "nobody")
def test_setup(broken): pass

@pytest.mark.semantic("area", "is left out", "nobody")
@pytest.mark.skip
def test_skipped(): pass

def test_unmarked(): pass
"""


def test_marked_tests_are_rows_and_nothing_failed_passes(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(TESTS)
    pytester.makeini("[pytest]\nmarkers = semantic(area, rule, reading): a row\n")
    collector = Collector()
    pytester.inline_run("-m", "semantic", "-p", "no:cacheprovider", plugins=[collector])
    rows = list(collector.rows())
    assert rows == [
        ("area", "holds", "arithmetic", "2", "pass"),
        ("area", "cannot be asked", "nobody", "1", "**fail**"),
        ("area", "is left out", "nobody", "1", "not run"),
        ("other", "holds at times", "arithmetic", "2", "**fail**"),
    ]
    text = markdown(rows, "a command")
    assert "1 of 4 rules pass" in text
    assert "| other | holds at times | arithmetic | 2 | **fail** |" in text


@pytest.mark.parametrize(
    ("outcome", "verdict"),
    [
        (Outcome(passed=3), "pass"),
        (Outcome(passed=3, failed=1), "**fail**"),
        (Outcome(passed=3, skipped=1), "not run"),
        (Outcome(), "not run"),
    ],
)
def test_a_rule_passes_only_if_all_its_checks_do(outcome: Outcome, verdict: str) -> None:
    assert outcome.verdict == verdict
