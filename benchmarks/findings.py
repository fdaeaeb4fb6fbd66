"""What a run of the benchmark found, told and kept figure by figure."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.comparison import Comparison
from benchmarks.figures import Asked, Figure, reason
from benchmarks.growth import Growth

Progress = Callable[[str], None]


@dataclass
class Findings:
    """All that one run found, so far."""

    progress: Progress
    figures: list[Figure] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    growths: list[Growth] = field(default_factory=list)

    def add(self, figure: Figure) -> None:
        """Keep a figure, and tell it at once."""
        self.figures.append(figure)
        name, measured, _, _, verdict, note = figure.cells()
        self.progress(", ".join(filter(None, (f"{name}: {measured}", verdict, note))))

    def collect(self, asked: Sequence[Asked], measure: Callable[[], None]) -> None:
        """Measure; of the figures asked for, those it did not add are listed with the reason.

        `measure` adds to these findings. What it raises costs what it had not added, nothing else.
        """
        why = "it was not looked at"
        try:
            measure()
        except Exception as error:
            traceback.print_exc()
            why = reason(error)
        told = {figure.name for figure in self.figures}
        for one in asked:
            if one.name not in told:
                self.add(one.missing(why))
