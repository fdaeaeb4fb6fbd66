"""One fault under load: what was seen before, during and after it, and what that amounts to."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from benchmarks.faults.load import Caller, Kind, Load, Outcome, Question
from benchmarks.faults.stand import Stand
from benchmarks.faults.watching import (
    Repeating,
    Size,
    Slope,
    Verdict,
    ask_readiness,
    measure,
    slope,
)

GAP_SECONDS = 2.0
"""No right answer to anybody for so long is an outage, even if no request failed."""
CALM_SECONDS = 2.0
"""Right answers only, for so long after an outage: it is over."""
MIN_SECONDS = 3.0
"""To look for an outage at least: it may take a while to begin."""
NEARBY_SECONDS = 0.75
"""What is shortly before or after a verdict."""
PROBE_PAUSE, SIZE_PAUSE = 0.3, 0.5


@dataclass(frozen=True)
class Truth:
    """How many verdicts of readiness there were, and which of them were false.

    falsely_ready: all requests that ended while it was asked, or shortly before or after, failed.
    falsely_unready: none failed, and right answers came shortly before it and shortly after.
    """

    verdicts: int
    falsely_ready: int
    falsely_unready: int


@dataclass(frozen=True)
class Result:
    """One row of the report.

    noticed: seconds from the fault until readiness said no; None where it never did.
    recovered: seconds from the fault's end until right answers alone came; None where they did not.
    """

    name: str
    counts: dict[Kind, int] = field(default_factory=dict)
    noticed: float | None = None
    recovered: float | None = None
    truth: Truth | None = None
    private: Slope | None = None
    shm: Slope | None = None
    restarts: int = 0
    remark: str = ""
    errors: tuple[tuple[str, int], ...] = ()
    """What was not answered right, by sentence."""
    skipped: str = ""
    """Why it was not run."""
    never_recovered: bool = False
    """Callers did not get right answers alone again in the time given."""

    @property
    def sent(self) -> int:
        return sum(self.counts.values())

    @property
    def failed(self) -> bool:
        """Whether something came of it that must not."""
        lost_or_wrong = self.counts.get(Kind.LOST, 0) + self.counts.get(Kind.WRONG, 0)
        return lost_or_wrong > 0 or self.never_recovered


class Trial:
    """Load and watchers around a stand; a context manager.

    hidden: errors that a caller must never see under this fault.
    """

    def __init__(
        self,
        name: str,
        stand: Stand,
        asked: Sequence[Question],
        *,
        callers: Sequence[Caller] | None = None,
        timeout: float = 8.0,
        hidden: Sequence[type[BaseException]] = (),
    ) -> None:
        self.name, self.stand, self.asked = name, stand, asked
        self.load = Load(callers or usual(stand), asked, timeout=timeout, hidden=hidden)
        self.others: list[Outcome] = []
        """Requests of the fault itself, such as poisoned ones."""
        self.unasked: list[Outcome] = []
        """Those of them that asked for no mask: counted only where they failed."""
        self.remark = ""
        self.injected: float | None = None
        self._cleared = 0.0
        self._verdicts: list[Verdict] = []
        self._sizes: list[Size] = []
        self._starts = stand.starts
        self._open = ExitStack()

    def inject(self, fault: Callable[[], object]) -> None:
        """Do the harm; what notices it is timed from here."""
        self.injected = time.monotonic()
        fault()
        self.cleared()

    def cleared(self) -> None:
        """The fault itself is over: what recovers is timed from here."""
        self._cleared = time.monotonic()

    @property
    def sizes(self) -> list[Size]:
        """The server's memory since the last `forget_sizes`."""
        return list(self._sizes)

    def forget_sizes(self) -> None:
        """What was measured so far is not for the slope."""
        self._sizes.clear()

    def recover(self, within: float = 60.0) -> None:
        """Until callers have had right answers alone for a while, or `within` seconds are over."""
        began = time.monotonic()
        while time.monotonic() < began + within:
            time.sleep(0.1)
            now = time.monotonic()
            if now > began + MIN_SECONDS and now - self._trouble(now) > CALM_SECONDS:
                return

    def result(self) -> Result:
        """What it amounts to, once the block is over."""
        outcomes = self.load.outcomes
        failed = [one for one in self.unasked if one.kind is not Kind.RIGHT]
        everything = [*outcomes, *self.others, *failed]
        recovered = self._recovered()
        said = Counter(one.said for one in everything if one.kind is not Kind.RIGHT)
        return Result(
            self.name,
            {kind: sum(one.kind is kind for one in everything) for kind in Kind},
            noticed=self._noticed(),
            recovered=recovered,
            never_recovered=self.injected is not None and recovered is None,
            truth=truth(self._verdicts, outcomes),
            private=slope(self._sizes, lambda size: size.private),
            shm=slope(self._sizes, lambda size: size.shm),
            restarts=self.stand.starts - self._starts,
            remark=self.remark,
            errors=tuple(said.most_common()),
        )

    def __enter__(self) -> Trial:
        with ExitStack() as entered:
            entered.enter_context(self.load)
            entered.enter_context(Repeating(self._look, PROBE_PAUSE))
            entered.enter_context(Repeating(self._weigh, SIZE_PAUSE))
            self.load.settle()
            self._open = entered.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _look(self) -> None:
        self._verdicts.append(ask_readiness(self.stand.container.target))

    def _weigh(self) -> None:
        requests = self.load.ended + len(self.others) + len(self.unasked)
        size = measure(self.stand.container, requests)
        if size is not None:
            self._sizes.append(size)

    def _noticed(self) -> float | None:
        if self.injected is None:
            return None
        noes = (v.ended for v in self._verdicts if not v.ready and v.ended > self.injected)
        first = next(noes, None)
        return None if first is None else first - self.injected

    def _recovered(self) -> float | None:
        """Zero where there was no outage after the fault; None where it did not end."""
        if self.injected is None:
            return None
        outcomes = self.load.outcomes
        trouble = last_trouble(outcomes, self.injected, outcomes[-1].ended)
        if trouble <= self._cleared:
            return 0.0
        rights = (one.ended for one in outcomes if one.kind is Kind.RIGHT and one.ended > trouble)
        first = next(rights, None)
        return None if first is None else first - self._cleared

    def _trouble(self, now: float) -> float:
        return last_trouble(self.load.outcomes, self.injected or now, now)


def usual(stand: Stand) -> list[Caller]:
    """A caller of every kind: all images anew, all by their ids, through shared memory."""
    return [
        Caller(stand.http, {"remember_images": 0}),
        Caller(stand.grpc),
        Caller(stand.grpc, {"remember_images": 0, "shared_memory": "system"}),
    ]


def last_trouble(outcomes: Sequence[Outcome], since: float, now: float) -> float:
    """When an outage was last seen: a failed request, or nobody answered for a while."""
    trouble = answered = since
    for one in outcomes:
        if one.ended <= since:
            continue
        if one.kind is not Kind.RIGHT:
            trouble = one.ended
            continue
        if one.ended - answered > GAP_SECONDS:
            trouble = max(trouble, one.ended - 1e-6)
        answered = one.ended
    return now if now - answered > GAP_SECONDS else trouble


def truth(verdicts: Sequence[Verdict], outcomes: Sequence[Outcome]) -> Truth:
    """Judge readiness by what became of the requests that ended around each verdict."""
    falsely_ready = falsely_unready = 0
    for verdict in verdicts:
        since, until = verdict.began - NEARBY_SECONDS, verdict.ended + NEARBY_SECONDS
        near = [one for one in outcomes if since < one.ended < until]
        right = [one.ended for one in near if one.kind is Kind.RIGHT]
        healthy = len(right) == len(near) and any(
            abs(ended - verdict.ended) < NEARBY_SECONDS and ended < verdict.ended for ended in right
        )
        after = any(one.began > verdict.ended and one.kind is Kind.RIGHT for one in near)
        falsely_ready += verdict.ready and bool(near) and not right
        falsely_unready += not verdict.ready and healthy and after
    return Truth(len(verdicts), falsely_ready, falsely_unready)
