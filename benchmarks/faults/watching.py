"""What is watched during a fault: readiness, memory and /dev/shm."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from benchmarks.faults.container import Container
from docker.entrypoint.probes import ProbeFailed, Target, ready

PROBE_SECONDS = 3.0
MIN_SAMPLES = 8
MIN_REQUESTS = 100
"""Minimum number of requests between the first and last sample for a meaningful slope."""


@dataclass(frozen=True)
class Verdict:
    """One answer of the readiness probe; times are from `time.monotonic`."""

    began: float
    ended: float
    ready: bool


@dataclass(frozen=True)
class Size:
    """The server's memory at one point in time."""

    server: int
    """The id of process 1: sizes of different servers do not belong on one line."""
    requests: int
    """Requests finished so far."""
    private: int
    """Bytes of unshared memory in all its processes."""
    shm: int
    """Bytes of its files in /dev/shm."""


@dataclass(frozen=True)
class Slope:
    """Growth per 10,000 requests and its standard error, in bytes."""

    growth: float
    error: float
    requests: int
    """Requests between the first and last sample."""


class Repeating:
    """Calls `look` in a thread, `pause` seconds apart, until the block is left.

    If `look` raises, the calls stop and leaving the block raises the same error: nothing was
    watched from then on.
    """

    def __init__(self, look: Callable[[], None], pause: float) -> None:
        self._look, self._pause = look, pause
        self._stop = threading.Event()
        self._failed: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            while not self._stop.wait(self._pause):
                self._look()
        except Exception as error:
            self._failed = error

    def __enter__(self) -> Repeating:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._failed is not None and kind is None:
            raise self._failed


def ask_readiness(target: Target) -> Verdict:
    """Run the probe of docker/entrypoint, as an orchestrator would."""
    began = time.monotonic()
    try:
        ready(target, PROBE_SECONDS)
        is_ready = True
    except ProbeFailed:
        is_ready = False
    return Verdict(began, time.monotonic(), is_ready)


def measure(container: Container, requests: int) -> Size | None:
    """The server's memory now; None while it is starting or stopping."""
    private = 0
    for process in container.descendants():
        try:
            memory = process.memory_info()
        except psutil.Error:
            return None
        private += memory.rss - memory.shared
    return Size(container.process.pid, requests, private, shm_bytes(container))


def shm_bytes(container: Container) -> int:
    """Bytes in /dev/shm under the server's prefix; in its own /dev/shm if it has one."""
    root = Path(f"/proc/{container.process.pid}/root/dev/shm")
    total = 0
    try:
        for path in root.glob(f"triton_sam3_port{container.http_port}_*"):
            total += path.stat().st_blocks * 512
    except OSError:  # the server is exiting
        return total
    return total


def slope(sizes: Sequence[Size], of: Callable[[Size], int]) -> Slope | None:
    """Fit a line through the last server's sizes; None if there are too few."""
    same = [size for size in sizes if size.server == sizes[-1].server]
    if len(same) < MIN_SAMPLES or same[-1].requests - same[0].requests < MIN_REQUESTS:
        return None
    requests = np.array([size.requests for size in same], float)
    values = np.array([of(size) for size in same], float)
    centred = requests - requests.mean()
    growth = float(centred @ values / (centred @ centred))
    rest = values - values.mean() - growth * centred
    error = float(np.sqrt(rest @ rest / (len(same) - 2) / (centred @ centred)))
    return Slope(growth * 1e4, error * 1e4, same[-1].requests - same[0].requests)
