"""Times of things that take turns, so that a noisy machine is as unkind to one as to the other."""

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
    """Repeated measurements of one quantity, in the order they were made."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("a sample needs at least one measurement")

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        """Lower quartile; of fewer than four values, the smallest."""
        return self._quartiles[0]

    @property
    def high(self) -> float:
        """Upper quartile; of fewer than four values, the largest."""
        return self._quartiles[1]

    def percentile(self, percent: float) -> float:
        """The value that `percent` of the measurements do not exceed (nearest rank)."""
        rank = max(0, -(-len(self.values) * percent // 100) - 1)
        return sorted(self.values)[int(rank)]

    def scaled(self, factor: float) -> Sample:
        """Every measurement times `factor`: another unit, or a share of each."""
        return Sample(tuple(value * factor for value in self.values))

    def plus(self, amount: float) -> Sample:
        """Every measurement and `amount` more, in the same unit."""
        return Sample(tuple(value + amount for value in self.values))

    @property
    def _quartiles(self) -> tuple[float, float]:
        if len(self.values) < 4:
            return min(self.values), max(self.values)
        first, _, third = statistics.quantiles(self.values, n=4, method="inclusive")
        return first, third


def ratio(ours: Sample, theirs: Sample) -> Sample:
    """Round by round: what was measured side by side is compared, drift between rounds is not."""
    pairs = zip(ours.values, theirs.values, strict=True)
    return Sample(tuple(a / b for a, b in pairs))


def difference(ours: Sample, theirs: Sample) -> Sample:
    """Round by round, as `ratio`."""
    pairs = zip(ours.values, theirs.values, strict=True)
    return Sample(tuple(a - b for a, b in pairs))


def seconds(call: Callable[[], object]) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


Meter = Callable[[], float]
"""Performs something once and returns what was measured, usually seconds."""


def stopwatch(call: Callable[[], object]) -> Meter:
    """A meter for a call of this process."""
    return lambda: seconds(call)


def alternate(
    meters: Mapping[Key, Meter],
    rounds: int,
    *,
    warmup: int = 1,
    pause: float = 0.0,
    budget: float = math.inf,
) -> dict[Key, Sample]:
    """Read every meter once a round, in an order that is shuffled each time, the same every run.

    Were one always read after the same other, it alone would bear what that one leaves behind:
    threads that still spin, caches full of its own. `warmup` rounds come first and are not counted;
    `pause`, in seconds, comes before each reading. After `budget` seconds no further round begins.
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
