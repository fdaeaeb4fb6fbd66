"""Alternating measurements, so that a noisy machine affects all candidates equally."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Sample:
    """Repeated measurements of one quantity, in order."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("a sample needs at least one measurement")

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        """Lower quartile; with fewer than four values, the smallest."""
        return self._quartiles[0]

    @property
    def high(self) -> float:
        """Upper quartile; with fewer than four values, the largest."""
        return self._quartiles[1]

    def percentile(self, percent: float) -> float:
        """The value that `percent` of the measurements do not exceed (nearest rank)."""
        rank = max(0, -(-len(self.values) * percent // 100) - 1)
        return sorted(self.values)[int(rank)]

    def scaled(self, factor: float) -> Sample:
        """Every measurement times `factor`: in another unit, or a share of each."""
        return Sample(tuple(value * factor for value in self.values))

    def plus(self, amount: float) -> Sample:
        """Every measurement plus `amount`, in the same unit."""
        return Sample(tuple(value + amount for value in self.values))

    @property
    def _quartiles(self) -> tuple[float, float]:
        if len(self.values) < 4:
            return min(self.values), max(self.values)
        first, _, third = statistics.quantiles(self.values, n=4, method="inclusive")
        return first, third


def ratio(ours: Sample, theirs: Sample) -> Sample:
    """Ratio round by round, so that drift between rounds cancels out."""
    pairs = zip(ours.values, theirs.values, strict=True)
    return Sample(tuple(a / b for a, b in pairs))


def difference(ours: Sample, theirs: Sample) -> Sample:
    """Difference round by round, like `ratio`."""
    pairs = zip(ours.values, theirs.values, strict=True)
    return Sample(tuple(a - b for a, b in pairs))


def seconds(call: Callable[[], object]) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


Meter = Callable[[], float]
"""Does something once and returns the measurement, usually in seconds."""


def stopwatch(call: Callable[[], object]) -> Meter:
    """A meter that times a call in this process."""
    return lambda: seconds(call)


def alternate(
    meters: Mapping[Key, Meter],
    rounds: int,
    *,
    warmup: int = 1,
    pause: float = 0.0,
    budget: float = math.inf,
) -> dict[Key, Sample]:
    """Read every meter once per round, in an order shuffled each round, but the same every run.

    If one were always read after the same other, it alone would suffer what that one leaves behind:
    threads still spinning, caches full of its data. The first `warmup` rounds are not counted;
    `pause`, in seconds, precedes each reading. After `budget` seconds no new round starts.
    """
    started = time.monotonic()
    names = list(meters)
    shuffle = random.Random(0).shuffle
    values: dict[Key, list[float]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        if number > warmup and time.monotonic() - started > budget:
            break
        shuffle(names)
        for name in names:
            time.sleep(pause)
            value = meters[name]()
            if number >= warmup:
                values[name].append(value)
    return {name: Sample(tuple(values[name])) for name in meters}
