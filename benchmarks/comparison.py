"""What every peer takes for the same two things."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.figures import markdown_table, quantity
from benchmarks.timing import Sample


@dataclass(frozen=True)
class Comparison:
    """Seconds by peer: from a photo nobody has seen to its first mask, and of a click."""

    model: str
    first_masks: Mapping[str, Sample]
    clicks: Mapping[str, Sample]

    def markdown(self) -> str:
        rows = [
            [name, _span(self.first_masks.get(name)), _span(click)]
            for name, click in self.clicks.items()
        ]
        return markdown_table(
            (f"{self.model}, median (quartiles)", "new photo to first mask", "click"), rows
        )


def _span(sample: Sample | None) -> str:
    if sample is None:
        return "not measured"
    unit, factor = ("s", 1) if sample.median >= 1 else ("ms", 1000)
    low, middle, high = (
        quantity(value * factor, unit) for value in (sample.low, sample.median, sample.high)
    )
    return middle if len(sample.values) == 1 else f"{middle} ({low} to {high})"
