"""When a request is sent again. Every request may be: none changes what another one answers."""

import numbers
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import Overloaded, SAM3Error, ServerUnreachable
from .flow import Call, Flow, Infer, Query, Sleep
from .translation import ModelGone, Refused

DEFAULT_TIMEOUT = 120.0
"""Seconds: a server on a CPU takes half a minute to encode an image at full size."""

RETRYABLE: tuple[type[SAM3Error], ...] = (ServerUnreachable, Overloaded, ModelGone)
"""A refused prompt stays refused and a spent deadline stays spent; these may pass."""


def check_count(name: str, value: Any) -> None:
    """ValueError where an argument is no whole number from 0 on."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 0:
        raise ValueError(f"{name} must be a whole number, 0 or more, got {value!r}")


@dataclass(frozen=True)
class Retries:
    """At most `attempts` further tries inside one deadline, pausing with jitter.

    What a proxy refused has cost the server nothing and uses up no try, unless there are none: a
    caller with more at work than the proxy lets in at once waits for its turn.

    The pause before try n is drawn evenly from the upper half of `base` * 2^n seconds, at most
    `cap`: many clients that lost the same server do not come back at the same moment, and no draw
    spends all tries on the first moment of an outage: four by default last 1.9 s at least.

    Raises ValueError for `attempts` that are no whole number from 0 on, and for a `timeout` that is
    no finite number of seconds above 0.
    """

    attempts: int
    timeout: float
    base: float = 0.25
    cap: float = 4.0
    clock: Callable[[], float] = time.monotonic
    uniform: Callable[[float, float], float] = random.uniform

    def __post_init__(self) -> None:
        check_count("retries", self.attempts)
        real = isinstance(self.timeout, numbers.Real)
        if not real or not 0 < self.timeout <= threading.TIMEOUT_MAX:
            raise ValueError(
                f"timeout must be a finite number of seconds above 0, got {self.timeout!r}"
            )
        object.__setattr__(self, "timeout", float(self.timeout))  # a lock takes no NumPy number

    def send(self, request: Infer | Query) -> Flow[Any]:
        """Send `request`, again where that is safe, until `timeout` seconds from now."""
        started = self.clock()
        deadline = started + self.timeout
        turn = failed = 0
        while True:
            now = self.clock()
            try:
                return (yield Call(request, max(deadline - now, 0.0), now - started))
            except RETRYABLE as error:
                if isinstance(error, ModelGone) and isinstance(request, Query):
                    raise  # who asks about a model is told at once
                failed += not isinstance(error, Refused)
                longest = min(self.cap, self.base * 2**turn)
                pause = self.uniform(longest / 2, longest)
                spent = not self.attempts or failed > self.attempts
                if spent or self.clock() + pause >= deadline:
                    raise
            yield Sleep(pause)
            turn += 1
