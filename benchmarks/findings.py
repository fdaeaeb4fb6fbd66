"""The results of a benchmark run, reported and collected figure by figure."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.comparison import Comparison
from benchmarks.figures import Figure, FigureSpec, reason
from benchmarks.growth import Growth

Progress = Callable[[str], None]


@dataclass
class Findings:
    """The results of one run so far."""

    progress: Progress
    figures: list[Figure] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    growths: list[Growth] = field(default_factory=list)

    def add(self, figure: Figure) -> None:
        """Add a figure and report it at once."""
        self.figures.append(figure)
        name, measured, _, _, verdict, note = figure.cells()
        self.progress(", ".join(filter(None, (f"{name}: {measured}", verdict, note))))

    def collect(self, specs: Sequence[FigureSpec], measure: Callable[[], None]) -> None:
        """Run `measure`, then list the requested figures that it did not add, with the reason.

        `measure` adds to these findings. If it raises, only the figures not added yet are lost.
        """
        why = "measuring it was skipped"
        try:
            measure()
        except Exception as error:
            traceback.print_exc()
            why = reason(error)
        added = {figure.name for figure in self.figures}
        for one in specs:
            if one.name not in added:
                self.add(one.missing(why))
