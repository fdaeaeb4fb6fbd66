"""What a run publishes: tables with the numbers measured, and a picture beside each."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from benchmarks import pages, plots
from benchmarks.anatomy import Anatomy, Phase
from benchmarks.comparison import Comparison
from benchmarks.environment import Provenance
from benchmarks.figures import FigureSpec, Target
from benchmarks.growth import Growth
from benchmarks.timing import Sample

ORIGIN = Provenance("make bench", "abc1234", "2 cores", "Python", "0.5")
FAST, SLOW = Sample((0.010, 0.011, 0.012)), Sample((0.050, 0.055, 0.060))


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """Sections by name; pictures go under `tmp_path`."""
    sections: dict[str, str] = {}
    monkeypatch.setattr(pages, "RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.setattr(pages, "write_section", sections.__setitem__)
    monkeypatch.setattr(plots, "PLOTS", tmp_path / "plots")
    return sections


def drawn(section: str, folder: Path) -> list[str]:
    """The pictures that a section refers to; they must be readable, and not all of one colour."""
    names = [line.partition("](")[2][:-1] for line in section.splitlines() if line[:2] == "!["]
    for name in names:
        with Image.open(folder / name) as picture:
            assert len(picture.convert("L").getcolors(256) or ()) > 5
    return names


def test_figures_are_beside_their_targets(published: dict[str, str]) -> None:
    spec = FigureSpec("ours / theirs", "ratio", Target(0.9, 0.5))
    pages.publish_figures("cpu", [spec.measured(Sample((0.6,))), spec.missing("no GPU")], ORIGIN)
    text = published["cpu-figures"]
    assert text.startswith("## Figures on a CPU\n\n`make bench` at commit abc1234")
    assert "| ours / theirs | 0.60 | 0.90 | 0.50 | must met |" in text
    assert "not measured | no GPU |" in text


def test_peers_are_compared_in_a_table_and_a_picture(
    published: dict[str, str], tmp_path: Path
) -> None:
    times = {"ours": FAST, "Meta's": SLOW}
    pages.publish_comparison("cpu", [Comparison("full size", times, times, times)], ORIGIN)
    text = published["cpu-peers"]
    assert "| ours | 11 ms (10 ms to 12 ms) |" in text
    assert drawn(text, tmp_path) == ["plots/cpu-clicks-full-size.png"]


def test_growing_costs_are_shown(published: dict[str, str], tmp_path: Path) -> None:
    curve = {1: Sample((5.0,)), 4: Sample((9.0,))}
    pages.publish_growth("cpu", [Growth("objects", "objects", "ms", {"ours": curve})], ORIGIN)
    text = published["cpu-growth"]
    assert "| ours | 5 ms | 9 ms |" in text
    assert drawn(text, tmp_path) == ["plots/cpu-growth.png"]


def test_the_longest_phase_of_a_request_is_named(published: dict[str, str], tmp_path: Path) -> None:
    phases = (Phase("client", "packs", 1.0), Phase("decoder", "computes", 7.0))
    pages.publish_anatomy("cpu", [Anatomy("a click", 10.0, phases)], ORIGIN)
    text = published["cpu-anatomy"]
    assert "A click: median 10.0 ms. The longest phase is decoder: computes" in text
    assert "with a median of 70% of that" in text
    assert drawn(text, tmp_path) == ["plots/cpu-anatomy-a-click.png"]
