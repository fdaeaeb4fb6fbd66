"""Publish a run's results on the results page: sections in Markdown, with plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks import plots
from benchmarks.anatomy import Anatomy
from benchmarks.comparison import Comparison
from benchmarks.environment import Provenance
from benchmarks.figures import Figure, figures_markdown
from benchmarks.growth import Growth
from benchmarks.results import RESULTS, write_section

FIGURES = {
    "cpu": "Figures on a CPU",
    "cuda-in-process": "Figures on a GPU, without a server",
    "cuda-served": "Figures on a GPU, served",
}
"""Titles by run; sections are named after the run."""


def publish_figures(run: str, figures: Sequence[Figure], origin: Provenance) -> None:
    """The main table: measured values next to their targets."""
    legend = (
        "Must and aim are this project's own targets. A ratio is the median of the rounds' ratios, "
        "not the quotient of the medians beside it."
    )
    _publish(f"{run}-figures", FIGURES[run], origin, legend, figures_markdown(figures))


def publish_comparison(run: str, comparisons: Sequence[Comparison], origin: Provenance) -> None:
    """Times to the first mask and for a click, by model and peer."""
    parts = [
        "A first mask includes keeping the photo for later clicks, except ours at full size. There "
        "the others' are encoding plus a click, measured apart. In Meta's predictor a loop over "
        "each hole of a mask is replaced by one count, with the same masks: it would take most of "
        "a click's time at full size, where weights are random and masks have thousands of holes."
    ]
    for comparison in comparisons:
        picture = plots.PLOTS / f"{run}-clicks-{comparison.model.replace(' ', '-')}.png"
        title = f"{comparison.model}: a click on an open image"
        series = {
            heading: {name: sample.scaled(1000) for name, sample in samples.items()}
            for heading, samples in comparison.click_columns.items()
        }
        plots.bars(picture, title, "ms", series)
        parts += [comparison.markdown(), _image(picture, title)]
    _publish(f"{run}-peers", "Beside the peers", origin, *parts)


def publish_growth(run: str, growths: Sequence[Growth], origin: Provenance) -> None:
    """Curves, and the tables behind them."""
    picture = plots.PLOTS / f"{run}-growth.png"
    plots.curves(picture, growths)
    tables = [f"{growth.title} ({growth.unit})\n\n{growth.markdown()}" for growth in growths]
    image = _image(picture, "cost as work grows")
    _publish(f"{run}-growth", "Cost as work grows", origin, image, *tables)


def publish_anatomy(run: str, anatomies: Sequence[Anatomy], origin: Provenance) -> None:
    """Where each millisecond goes."""
    parts = []
    for anatomy in anatomies:
        picture = plots.PLOTS / f"{run}-anatomy-{anatomy.title.replace(' ', '-')}.png"
        plots.waterfall(picture, anatomy)
        largest = anatomy.largest
        share = largest.milliseconds / anatomy.milliseconds
        sentence = (
            f"{anatomy.title.capitalize()}: median {anatomy.milliseconds:.1f} ms. The longest "
            f"phase is {largest.where}: {largest.what}, with a median of {share:.0%} of that."
        )
        parts += [sentence, _image(picture, anatomy.title)]
    _publish(f"{run}-anatomy", "Where a request's time goes", origin, *parts)


def _publish(name: str, title: str, origin: Provenance, *parts: str) -> None:
    write_section(name, "\n\n".join([f"## {title}", origin.markdown(), *parts]))


def _image(path: Path, text: str) -> str:
    return f"![{text}]({path.relative_to(RESULTS.parent).as_posix()})"
