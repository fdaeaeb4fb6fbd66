import pytest
from rich.console import Console

from benchmarks.figures import (
    HEADER,
    Figure,
    FigureSpec,
    Target,
    figures_markdown,
    markdown_table,
    quantity,
    reason,
    rich_table,
)
from benchmarks.timing import Sample

RATIO = Target(must=0.5, aim=0.38)
RATE = Target(must=85, aim=100, more_is_better=True)


@pytest.mark.parametrize(
    ("target", "value", "verdict"),
    [
        (RATIO, 0.38, "aim met"),
        (RATIO, 0.39, "must met"),
        (RATIO, 0.50, "must met"),
        (RATIO, 0.60, "missed by 20%"),
        (RATE, 100, "aim met"),
        (RATE, 99, "must met"),
        (RATE, 42.5, "missed by 50%"),
    ],
)
def test_verdicts(target: Target, value: float, verdict: str) -> None:
    assert target.verdict(value) == verdict


def test_a_figure_that_was_not_measured_says_why() -> None:
    figure = FigureSpec("clicks", "1/s", RATE).missing("this machine has no GPU")
    assert figure.verdict == "not measured"
    assert figure.cells() == ("clicks", "—", "85 1/s", "100 1/s", "not measured", figure.note)
    with pytest.raises(ValueError, match="say why"):
        Figure("clicks", "1/s", None)


def test_a_measured_figure_shows_its_spread() -> None:
    figure = FigureSpec("encode", "ms", Target(12, 10)).measured(Sample((9.0, 11.0, 14.0)), "fp16")
    assert figure.cells() == (
        "encode",
        "11 ms (9 ms to 14 ms)",
        "12 ms",
        "10 ms",
        "must met",
        "fp16",
    )


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.4567, "ratio", "0.46"),
        (1 / 400, "ratio", "1/400"),
        (7_500, "images", "7,500 images"),
        (1.2345, "ms", "1.23 ms"),
        (0.99312, "", "0.993"),
    ],
)
def test_quantities(value: float, unit: str, text: str) -> None:
    assert quantity(value, unit) == text


def test_tables_have_a_row_for_every_figure() -> None:
    figures = [
        FigureSpec("a", "ms").measured(Sample((1.0,))),
        FigureSpec("b", "ms", RATE).missing("no GPU"),
    ]
    lines = figures_markdown(figures).splitlines()
    assert len(lines) == 4
    assert all(line.count("|") == len(HEADER) + 1 for line in lines)
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(rich_table("title", figures))
    assert "no GPU" in console.export_text()


def test_a_reason_with_brackets_is_shown_as_it_is() -> None:
    """Rich would take them for markup, and raise on a tag that it does not know."""
    console = Console(width=200, record=True)
    console.print(
        rich_table("title", [FigureSpec("name", "ms").missing("no [/usr/lib/x.so] [1, 2]")])
    )
    assert "no [/usr/lib/x.so] [1, 2]" in console.export_text()


def test_a_bar_in_a_cell_does_not_end_it() -> None:
    assert markdown_table(["a"], [["x|y"]]).splitlines()[-1] == "| x\\|y |"


def test_a_reason_is_one_line() -> None:
    assert reason(RuntimeError("first\nsecond")) == "RuntimeError: first"
