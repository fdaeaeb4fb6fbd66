"""The client logic, written once: a flow yields steps, a client performs them.

A flow is a generator. It yields the values below, receives each one's result (or has its error
thrown in), and returns the answer. `Client` blocks on each step, `AsyncClient` awaits it; the order
of requests, retries and recovery is pure code that neither of them duplicates.
"""

import asyncio
import threading
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import numpy.typing as npt

Array = npt.NDArray[Any]
Lock: TypeAlias = "asyncio.Lock | threading.Lock"
T = TypeVar("T")
Flow = Generator["Step", Any, T]

LONGEST_TIMEOUT = 1e9
"""Seconds: gRPC counts nanoseconds since 1970 in 64 bits, which overflow in 2262."""


@dataclass(frozen=True)
class InSharedMemory:
    """An input stored in a registered shared memory region instead of in the request."""

    region: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int = 0


@dataclass(frozen=True)
class Infer:
    """One inference: arrays by tensor name, batch dimension first. Returns arrays by name."""

    model: str
    inputs: Mapping[str, Array | InSharedMemory]
    outputs: tuple[str, ...]
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Query:
    """Any other call: a method that all four of tritonclient's clients have under this name."""

    method: str
    args: tuple[str | int | bytes, ...] = ()


@dataclass(frozen=True)
class Call:
    """Send `request`, giving up after `timeout` seconds.

    steps.py cuts that to the time left for the public call, and says how long it has already taken.
    """

    request: Infer | Query
    timeout: float = LONGEST_TIMEOUT
    spent: float = 0.0


@dataclass(frozen=True)
class Sleep:
    seconds: float


@dataclass(frozen=True)
class Compute:
    """CPU-bound work: an event loop hands it to a thread."""

    function: Callable[[], Any]


@dataclass(frozen=True)
class Acquire:
    """Wait for `lock`, as long as the public call may take; the flow releases it itself."""

    lock: Lock
    timeout: float = LONGEST_TIMEOUT


Step = Call | Sleep | Compute | Acquire
