"""One fault under load: what was observed before, during and after it, and the result."""

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
"""If no caller gets a right answer for this long, it is an outage, even if no request failed."""
CALM_SECONDS = 2.0
"""An outage is over after this long with only right answers."""
MIN_SECONDS = 3.0
"""Minimum time to look for an outage, which may take a while to begin."""
NEARBY_SECONDS = 0.75
"""What counts as shortly before or after a verdict."""
PROBE_PAUSE, SIZE_PAUSE = 0.3, 0.5


@dataclass(frozen=True)
class Truth:
    """How many readiness verdicts there were, and how many of them were false.

    falsely_ready: all requests that finished during the probe, or shortly before or after, failed.
    falsely_unready: none failed, and there were right answers shortly before and shortly after.
    """

    verdicts: int
    falsely_ready: int
    falsely_unready: int


@dataclass(frozen=True)
class Result:
    """One row of the report.

    noticed: seconds from the fault until the readiness probe failed; None if it never did.
    recovered: seconds from the fault's end until all answers were right; None if that never was so.
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
    """Errors of requests that were not answered right, and their counts."""
    skipped: str = ""
    """Why it was not run."""
    never_recovered: bool = False
    """Callers kept getting other than right answers until the time limit."""

    @property
    def sent(self) -> int:
        return sum(self.counts.values())

    @property
    def failed(self) -> bool:
        """Whether requests were lost or answered wrongly, or the server never recovered."""
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
        questions: Sequence[Question],
        *,
        callers: Sequence[Caller] | None = None,
        timeout: float = 8.0,
        hidden: Sequence[type[BaseException]] = (),
    ) -> None:
        self.name, self.stand, self.questions = name, stand, questions
        self.load = Load(callers or usual(stand), questions, timeout=timeout, hidden=hidden)
        self.others: list[Outcome] = []
        """Requests of the fault itself, such as poisoned ones."""
        self.unasked: list[Outcome] = []
        """Those that asked for no mask: counted only if they failed."""
        self.remark = ""
        self.injected: float | None = None
        self._cleared = 0.0
        self._verdicts: list[Verdict] = []
        self._sizes: list[Size] = []
        self._starts = stand.starts
        self._open = ExitStack()

    def inject(self, fault: Callable[[], object]) -> None:
        """Cause the fault; the time until it is noticed starts here."""
        self.injected = time.monotonic()
        fault()
        self.cleared()

    def cleared(self) -> None:
        """Mark the fault itself as over; the time to recover starts here."""
        self._cleared = time.monotonic()

    @property
    def sizes(self) -> list[Size]:
        """The server's memory since the last `forget_sizes`."""
        return list(self._sizes)

    def forget_sizes(self) -> None:
        """Exclude what was measured so far from the slope."""
        self._sizes.clear()

    def recover(self, within: float = 60.0) -> None:
        """Wait until callers have had only right answers for a while, at most `within` seconds."""
        began = time.monotonic()
        while time.monotonic() < began + within:
            time.sleep(0.1)
            now = time.monotonic()
            if now > began + MIN_SECONDS and now - self._trouble(now) > CALM_SECONDS:
                return

    def result(self) -> Result:
        """The result, once the block has been left."""
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
        """Zero if there was no outage after the fault; None if it did not end."""
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
    """Callers of every kind: sending every image, using ids, and using shared memory."""
    return [
        Caller(stand.http, {"remember_images": 0}),
        Caller(stand.grpc),
        Caller(stand.grpc, {"remember_images": 0, "shared_memory": "system"}),
    ]


def last_trouble(outcomes: Sequence[Outcome], since: float, now: float) -> float:
    """When an outage was last seen: a failed request, or no answers for a while."""
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
    """Judge readiness by the requests that finished, or hung, around each verdict."""
    falsely_ready = falsely_unready = 0
    for verdict in verdicts:
        since, until = verdict.began - NEARBY_SECONDS, verdict.ended + NEARBY_SECONDS
        near = [one for one in outcomes if since < one.ended < until]
        right = [one.ended for one in near if one.kind is Kind.RIGHT]
        healthy = len(right) == len(near) and any(
            abs(ended - verdict.ended) < NEARBY_SECONDS and ended < verdict.ended for ended in right
        )
        after = any(one.began > verdict.ended and one.kind is Kind.RIGHT for one in near)
        hanging = any(one.began < since and until <= one.ended for one in outcomes)
        falsely_ready += verdict.ready and (bool(near) or hanging) and not right
        falsely_unready += not verdict.ready and healthy and after
    return Truth(len(verdicts), falsely_ready, falsely_unready)
