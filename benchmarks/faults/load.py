"""Callers that know the right answer to every request, and the outcome of each.

right   exactly the mask that the healthy server gave
clear   one of the client's errors that say what to do, within the deadline
lost    no answer within the deadline, or an outage that the client should have hidden
wrong   anything else: a different mask, an error that explains nothing
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from demo.scenes import generate
from triton_sam3 import (
    Client,
    DeadlineExceeded,
    ImageNotKept,
    InvalidRequest,
    ModelUnavailable,
    Overloaded,
    SAM3Error,
    ServerUnreachable,
)

SIDE = 64
GRACE_SECONDS = 2.0
"""How long after its deadline an answer may arrive on a busy machine."""
SETTLED = 3
"""Right answers per caller after which the load counts as steady."""
CLEAR = (
    DeadlineExceeded,
    ImageNotKept,
    InvalidRequest,
    ModelUnavailable,
    Overloaded,
    ServerUnreachable,
)
"""Errors whose message ends with what to do about it."""


class Kind(str, Enum):
    """The outcome of a request."""

    RIGHT = "right"
    CLEAR = "clear"
    LOST = "lost"
    WRONG = "wrong"


@dataclass(frozen=True)
class Outcome:
    """One request and its outcome; times are from `time.monotonic`."""

    began: float
    ended: float
    kind: Kind
    said: str = ""
    """The error's type and message."""


@dataclass(frozen=True)
class Question:
    """A picture, a point in it, and the mask that a healthy server returns for it."""

    image: npt.NDArray[np.uint8]
    point: tuple[int, int]
    mask: npt.NDArray[np.bool_] | None = None

    def ask(self, client: Client) -> npt.NDArray[np.bool_]:
        return client.segment(self.image, points=[self.point]).masks


def answered_questions(client: Client, count: int = 8) -> list[Question]:
    """Generated pictures with a click on an object in each, answered by a healthy server.

    Raises RuntimeError if two answers are the same, so that a mix-up would go unnoticed.
    """
    unanswered = [_question(seed) for seed in range(count)]
    answered = [Question(one.image, one.point, one.ask(client)) for one in unanswered]
    if len({one.mask.tobytes() for one in answered if one.mask is not None}) < count:
        raise RuntimeError("two pictures have the same mask, so a mix-up would go unnoticed")
    return answered


def _question(seed: int) -> Question:
    scene = generate(seed, SIDE)
    ys, xs = np.nonzero(scene.labels == 1)
    if len(xs) == 0:
        ys, xs = np.nonzero(np.ones_like(scene.labels))
    middle = len(xs) // 2
    return Question(scene.image, (int(xs[middle]), int(ys[middle])))


def judge(
    answer: npt.NDArray[np.bool_] | BaseException,
    right: npt.NDArray[np.bool_] | None,
    seconds: float,
    deadline: float,
    hidden: Sequence[type[BaseException]] = (),
) -> Kind:
    """Judge a request that took `seconds`; the client should have hidden errors in `hidden`."""
    if seconds > deadline + GRACE_SECONDS:
        return Kind.LOST
    if isinstance(answer, BaseException):
        if isinstance(answer, tuple(hidden)):
            return Kind.LOST
        return Kind.CLEAR if isinstance(answer, CLEAR) else Kind.WRONG
    return Kind.RIGHT if right is not None and np.array_equal(answer, right) else Kind.WRONG


@dataclass(frozen=True)
class Caller:
    """How a caller connects, by URL and other options of `Client`, and how often it asks."""

    url: str
    options: dict[str, Any] = field(default_factory=dict)
    pause: float = 0.0
    """Seconds between an answer and the next question."""


class Load:
    """Callers in threads, each asking one question after another until the block is left."""

    def __init__(
        self,
        callers: Iterable[Caller],
        questions: Sequence[Question],
        *,
        timeout: float = 8.0,
        hidden: Sequence[type[BaseException]] = (),
    ) -> None:
        self._callers, self._questions = tuple(callers), questions
        self._timeout, self._hidden = timeout, hidden
        self._stop = threading.Event()
        self._guard = threading.Lock()
        self._outcomes: list[Outcome] = []
        self._threads: list[threading.Thread] = []

    @property
    def outcomes(self) -> list[Outcome]:
        """Outcomes so far, in order of completion."""
        with self._guard:
            return list(self._outcomes)

    @property
    def ended(self) -> int:
        return len(self._outcomes)

    def settle(self, within: float = 60.0) -> None:
        """Wait for a few right answers per caller. Raises RuntimeError if they do not arrive."""
        wanted, deadline = SETTLED * len(self._callers), time.monotonic() + within
        while sum(one.kind is Kind.RIGHT for one in self.outcomes) < wanted:
            if time.monotonic() > deadline:
                said = Counter(one.said for one in self.outcomes).most_common(3)
                raise RuntimeError(f"the healthy server does not answer the load: {said}")
            time.sleep(0.05)

    def __enter__(self) -> Load:
        for number, caller in enumerate(self._callers):
            self._threads.append(threading.Thread(target=self._repeat, args=(number, caller)))
            self._threads[-1].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _repeat(self, number: int, caller: Caller) -> None:
        rng = np.random.default_rng(number)
        with Client(caller.url, timeout=self._timeout, **caller.options) as client:
            while not self._stop.is_set():
                question = self._questions[int(rng.integers(len(self._questions)))]
                outcome = self._ask(client, question)
                with self._guard:
                    self._outcomes.append(outcome)
                error = 0.1 if outcome.kind is not Kind.RIGHT else 0.0  # a person stops to look
                self._stop.wait(max(caller.pause, error))

    def _ask(self, client: Client, question: Question) -> Outcome:
        return observe(lambda: question.ask(client), question.mask, self._timeout, self._hidden)


def observe(
    ask: Callable[[], npt.NDArray[np.bool_]],
    right: npt.NDArray[np.bool_] | None,
    deadline: float,
    hidden: Sequence[type[BaseException]] = (),
) -> Outcome:
    """Ask once and judge the answer; an unexpected exception counts as a wrong answer."""
    began = time.monotonic()
    answer: npt.NDArray[np.bool_] | BaseException
    try:
        answer, said = ask(), ""
    except Exception as error:
        answer, said = error, f"{type(error).__name__}: {error}"
        if not isinstance(error, SAM3Error):
            said = f"not one of the client's errors: {said}"
    ended = time.monotonic()
    return Outcome(began, ended, judge(answer, right, ended - began, deadline, hidden), said)
