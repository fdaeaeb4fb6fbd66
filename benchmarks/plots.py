"""Plots of results: small PNG files next to the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.anatomy import Anatomy
from benchmarks.growth import Growth
from benchmarks.timing import Sample

PLOTS = Path(__file__).resolve().parent / "plots"
DOTS_PER_INCH = 100
HIGHLIGHT, OTHER = "#2a6f4e", "#9aa5b1"


def bars(path: Path, title: str, unit: str, series: Mapping[str, Mapping[str, Sample]]) -> None:
    """Horizontal bars with quartiles, one per name, starting at zero; the first is highlighted.

    series: measurements by name; each series adds a bar per name, paler than the one before.
    """
    names = list(next(iter(series.values())))
    height = 0.8 / len(series)
    picture, axes = plt.subplots(figsize=(8, 0.7 * len(names) + 1.2))
    for number, (label, samples) in enumerate(series.items()):
        medians = [samples[name].median for name in names]
        below = [samples[name].median - samples[name].low for name in names]
        above = [samples[name].high - samples[name].median for name in names]
        drawn = axes.barh(
            [row + number * height for row in range(len(names))],
            medians,
            height,
            xerr=(below, above),
            color=[HIGHLIGHT, *[OTHER] * (len(names) - 1)],
            alpha=1 / (1 + number),
            ecolor="#444444",
            capsize=3,
            label=label,
        )
        axes.bar_label(drawn, [f"{median:.3g}" for median in medians], padding=4, fontsize=8)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(names))], names)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel(f"{unit}, median and quartiles")
    axes.set_title(title, loc="left")
    axes.legend(fontsize=8)
    _save(picture, path)


def curves(path: Path, growths: Sequence[Growth]) -> None:
    """One small panel per kind of work."""
    columns = 2
    rows = -(-len(growths) // columns)
    picture, panels = plt.subplots(rows, columns, figsize=(10, 3.2 * rows), squeeze=False)
    for growth, axes in zip(growths, panels.flat, strict=False):
        _panel(axes, growth)
    for axes in list(panels.flat)[len(growths) :]:
        axes.set_visible(False)
    _save(picture, path)


def _panel(axes: Axes, growth: Growth) -> None:
    for name, curve in growth.curves.items():
        amounts = sorted(curve)
        medians = [curve[amount].median for amount in amounts]
        axes.plot(amounts, medians, marker="o", markersize=3, label=name)
        low = [curve[amount].low for amount in amounts]
        high = [curve[amount].high for amount in amounts]
        axes.fill_between(amounts, low, high, alpha=0.2)
    amounts = sorted({amount for curve in growth.curves.values() for amount in curve})
    axes.set_xscale("log", base=2)
    axes.set_xticks(amounts, [str(amount) for amount in amounts])
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(growth.work)
    axes.set_ylabel(growth.unit)
    axes.set_title(growth.title, loc="left", fontsize=10)
    axes.legend(fontsize=7)


def waterfall(path: Path, anatomy: Anatomy) -> None:
    """A request's phases below one another, each starting where the previous one ends."""
    phases = anatomy.phases
    picture, axes = plt.subplots(figsize=(9, 0.32 * len(phases) + 1.2))
    start = 0.0
    for row, phase in enumerate(phases):
        colour = HIGHLIGHT if phase is anatomy.largest else OTHER
        axes.barh(row, phase.milliseconds, left=start, color=colour)
        start += phase.milliseconds
        axes.text(start, row, f" {phase.milliseconds:.2f} ms", va="center", fontsize=8)
    axes.set_yticks(range(len(phases)), [f"{p.where}: {p.what}" for p in phases], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * start)
    axes.set_xlabel("milliseconds: the phases' medians, end to end")
    axes.set_title(f"{anatomy.title}: {anatomy.milliseconds:.1f} ms on the median", loc="left")
    _save(picture, path)


def _save(picture: Picture, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    picture.tight_layout()
    picture.savefig(path, dpi=DOTS_PER_INCH)
    plt.close(picture)
