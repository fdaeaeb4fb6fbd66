"""How long every peer takes for the same two tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.figures import markdown_table, quantity
from benchmarks.timing import Sample

PAUSE = 0.3
"""Seconds of rest before a click: enough for threads and cores to fall asleep."""


@dataclass(frozen=True)
class Comparison:
    """Seconds by peer: from a new photo to its first mask, and for a click.

    Clicks are timed back to back, and after a pause, as when a person makes them.
    """

    model: str
    first_masks: Mapping[str, Sample]
    clicks: Mapping[str, Sample]
    clicks_after_pause: Mapping[str, Sample]

    @property
    def click_columns(self) -> dict[str, Mapping[str, Sample]]:
        """The clicks' samples by column heading."""
        return {"click": self.clicks, f"click after {PAUSE} s of rest": self.clicks_after_pause}

    def markdown(self) -> str:
        columns = {"new photo to first mask": self.first_masks, **self.click_columns}
        rows = [
            [name, *(_span(measured.get(name)) for measured in columns.values())]
            for name in self.clicks
        ]
        return markdown_table((f"{self.model}, median (quartiles)", *columns), rows)


def _span(sample: Sample | None) -> str:
    if sample is None:
        return "not measured"
    unit, factor = ("s", 1) if sample.median >= 1 else ("ms", 1000)
    low, middle, high = (
        quantity(value * factor, unit) for value in (sample.low, sample.median, sample.high)
    )
    return middle if len(sample.values) == 1 else f"{middle} ({low} to {high})"
