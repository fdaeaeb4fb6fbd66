"""Many requests of every kind over a long time, to check that memory stays flat."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.environment import Provenance
from benchmarks.faults.bench import Bench
from benchmarks.faults.load import Caller, Kind
from benchmarks.faults.report import MIB
from benchmarks.faults.stand import Stand
from benchmarks.faults.trial import Trial, usual
from benchmarks.faults.watching import Size, Slope, slope
from benchmarks.figures import markdown_table

KEPT_IMAGES = 64
"""Few enough to fill the store within seconds: later growth is not kept images."""
WARM_UP = 0.2
"""Share of the time before memory is measured."""
THIRDS = 3
MAX_GROWTH = 1.0 * MIB
"""Per 10,000 requests: a leak of a hundred bytes per request amounts to this."""
ERRORS = 3
"""Standard errors by which growth must exceed that, to distinguish it from noise."""


@dataclass(frozen=True)
class Soak:
    """The result of a soak test."""

    minutes: float
    counts: Counter[Kind]
    sizes: list[Size]
    """Samples after the warm-up."""

    @property
    def grows(self) -> bool:
        """Whether memory or /dev/shm did not stay flat."""
        slopes = (slope(self.sizes, of) for of in (_private, _shm))
        return any(one and one.growth - ERRORS * one.error > MAX_GROWTH for one in slopes)

    def table(self) -> str:
        """Memory at the beginning and end of the measured time, and its slope."""
        rows = []
        for name, of in (("memory", _private), ("/dev/shm", _shm)):
            values = np.array([of(size) for size in self.sizes]) / MIB
            first, *_, last = np.array_split(values, THIRDS)
            trend = _per_ten_thousand(slope(self.sizes, of))
            rows.append((name, f"{first.mean():.1f} MiB", f"{last.mean():.1f} MiB", trend))
        return markdown_table(("", "first third", "last third", "per 10,000 requests"), rows)

    def page(self, origin: Provenance) -> str:
        """The section in Markdown."""
        outcomes = ", ".join(f"{self.counts[kind]:,} {kind.value}" for kind in Kind)
        words = (
            f"{self.minutes:g} minutes of new images, clicks by id and shared memory over both "
            f"protocols; the server keeps {KEPT_IMAGES} images. {self.counts.total():,} requests: "
            f"{outcomes}. The table excludes the first fifth of the time; the slope is given with "
            "its standard error, and memory is what the processes do not share."
        )
        return "\n\n".join(("## Soak", origin.markdown(), words, self.table()))


def run(repository: Path, minutes: float) -> Soak:
    """Run the soak test. Raises RuntimeError if the server was restarted meanwhile."""
    with (
        TemporaryDirectory(prefix="triton-sam3-soak-") as folder,
        Bench(repository, Path(folder)) as bench,
    ):
        return _run(bench, minutes)


def _run(bench: Bench, minutes: float) -> Soak:
    repository, _ = bench.copy_keeping(KEPT_IMAGES)
    with Stand(repository, bench.folder()) as stand:
        questions = bench.questions(stand)
        callers = [*usual(stand), Caller(stand.http)]
        with Trial("soak", stand, questions, callers=callers, timeout=30.0) as trial:
            time.sleep(60 * minutes * WARM_UP)
            trial.forget_sizes()
            time.sleep(60 * minutes * (1 - WARM_UP))
            sizes = trial.sizes
        if stand.starts > 1:
            raise RuntimeError(f"the server was restarted {stand.starts - 1} times")
        return Soak(minutes, Counter(one.kind for one in trial.load.outcomes), sizes)


def _private(size: Size) -> int:
    return size.private


def _shm(size: Size) -> int:
    return size.shm


def _per_ten_thousand(found: Slope | None) -> str:
    if found is None:
        return "too few requests"
    return f"{found.growth / MIB:+.2f} ± {found.error / MIB:.2f} MiB"
