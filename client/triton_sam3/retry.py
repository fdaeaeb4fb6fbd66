"""When a request is retried. Every request may be: none changes the answer to another, except that
a shared memory region is registered only once, which `shared_memory` allows for."""

import numbers
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import Overloaded, SAM3Error, ServerUnreachable
from .flow import LONGEST_TIMEOUT, Call, Flow, Infer, Query, Sleep
from .translation import ModelGone, Refused

DEFAULT_TIMEOUT = 120.0
"""Seconds: a server on a CPU takes half a minute to encode an image at full size."""

RETRYABLE: tuple[type[SAM3Error], ...] = (ServerUnreachable, Overloaded, ModelGone)
"""A rejected prompt stays rejected and an expired deadline stays expired; these may pass."""


def check_count(name: str, value: Any, at_least: int = 0) -> None:
    """Raise ValueError if an argument is not an integer of at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < at_least:
        raise ValueError(f"{name} must be an integer of at least {at_least}, got {value!r}")


def check_timeout(value: Any) -> float:
    """Return `value` as a float; ValueError unless it is a number of seconds above 0, at most
    `LONGEST_TIMEOUT`."""
    number: Any = value if isinstance(value, numbers.Real) else None
    if number is None or not 0 < number <= LONGEST_TIMEOUT:
        raise ValueError(
            f"timeout must be a number of seconds above 0, at most {LONGEST_TIMEOUT:g}, got "
            f"{value!r}"
        )
    return float(number)  # a lock accepts no NumPy number


@dataclass(frozen=True)
class Retries:
    """At most `attempts` retries, with jittered pauses, in the time that the public call may take.

    A request that a proxy rejects has cost the server nothing and does not count as a retry, unless
    `attempts` is 0: a caller with more in flight than the proxy admits waits for its turn.

    The pause before retry n is drawn uniformly from the upper half of `base` * 2^n seconds, at most
    `cap`: many clients that lost the same server do not return at the same moment, and no draw
    spends all retries on the first moment of an outage: the default of four lasts at least 1.9 s.

    Raises ValueError if `attempts` is not a non-negative integer.
    """

    attempts: int
    base: float = 0.25
    cap: float = 4.0
    uniform: Callable[[float, float], float] = random.uniform

    def __post_init__(self) -> None:
        check_count("retries", self.attempts)

    def send(self, request: Infer | Query) -> Flow[Any]:
        """Send `request`, retrying errors that may pass."""
        attempt = failed = 0
        while True:
            try:
                return (yield Call(request))
            except RETRYABLE as error:
                if isinstance(error, ModelGone) and isinstance(request, Query):
                    raise  # a query about a model reports this at once
                failed += not isinstance(error, Refused)
                if not self.attempts or failed > self.attempts:
                    raise
            longest = min(self.cap, self.base * 2 ** min(attempt, 30))
            yield Sleep(self.uniform(longest / 2, longest))
            attempt += 1
