"""Clicks per second with a number of people clicking at once, each on a different image.

The callers run in separate processes, so that their cost does not slow the benchmark down; each
process runs several callers in threads.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from queue import Empty
from threading import BrokenBarrierError

import numpy as np

from benchmarks.peers import Click, Peer, Photo
from benchmarks.timing import Sample

CALLERS_PER_PROCESS = 8
"""With more, they would wait for Python's GIL rather than for the server. But their processes never
take more than half of the cores, which the server needs."""
CALLER_SECONDS = 300.0
"""In addition to the time they click: to start, and to open a photo each."""


@dataclass(frozen=True)
class Throughput:
    """The throughput that a number of concurrent clickers achieved."""

    per_second: float
    latency: Sample
    """Seconds, of every click."""


def measure(
    make_peer: Callable[[], Peer], photo: Photo, clients: int, duration: float
) -> Throughput:
    """Click for `duration` seconds with `clients` callers; `make_peer` must be picklable."""
    shares = _shares(clients)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(len(shares))
    queue = context.Queue()
    firsts = np.cumsum([0, *shares[:-1]]).tolist()
    processes = [
        context.Process(
            target=_report,
            args=(queue, make_peer, photo, range(first, first + share), duration, barrier),
        )
        for first, share in zip(firsts, shares, strict=True)
    ]
    for process in processes:
        process.start()
    try:
        reports = [queue.get(timeout=duration + CALLER_SECONDS) for _ in processes]
    except Empty:
        raise RuntimeError(f"a caller said nothing for {CALLER_SECONDS:g} s") from None
    finally:
        for process in processes:
            process.join(1)
            process.kill()
    failures = [report for report in reports if isinstance(report, str)]
    if failures:
        # Report the original failure, not the broken barrier that the others saw.
        original = min(
            failures, key=lambda failure: failure.startswith(BrokenBarrierError.__name__)
        )
        raise RuntimeError(f"a caller failed: {original}")
    latencies = [value for report in reports for value in report]
    in_time = len(latencies) - clients  # each caller's last click was answered too late
    return Throughput(in_time / duration, Sample(tuple(latencies)))


def _shares(clients: int) -> list[int]:
    """How many callers each process runs."""
    most = max(1, (os.cpu_count() or 1) // 2)
    count = min(most, -(-clients // CALLERS_PER_PROCESS))
    return [len(part) for part in np.array_split(np.arange(clients), count)]


def _report(  # type: ignore[no-untyped-def]
    queue, make_peer: Callable[[], Peer], photo: Photo, numbers: range, duration: float, barrier
) -> None:
    try:
        queue.put(_click_for(make_peer, photo, numbers, duration, barrier))
    except BaseException as error:
        queue.put(f"{type(error).__name__}: {error}")
        barrier.abort()


def _click_for(
    make_peer: Callable[[], Peer],
    photo: Photo,
    numbers: Sequence[int],
    duration: float,
    barrier: Barrier,
) -> list[float]:
    """Latencies of the clicks made within `duration`, of all callers together."""
    peer = make_peer()
    clicks = [peer.open(shifted(photo, number)) for number in numbers]
    for click in clicks:
        click(1, 1)
    barrier.wait(timeout=600)
    deadline = time.perf_counter() + duration
    with ThreadPoolExecutor(len(clicks)) as executor:
        spans = executor.map(
            lambda n, click: _click_until(deadline, click, photo, n), numbers, clicks
        )
        latencies = [value for span in spans for value in span]
    peer.close()
    return latencies


def _click_until(deadline: float, click: Click, photo: Photo, seed: int) -> list[float]:
    """Latencies of clicks. Only the last is answered after the deadline: without it, a slow peer
    would seem faster than it is."""
    places = np.random.default_rng(seed)
    latencies: list[float] = []
    while True:
        x, y = places.random(2) * (photo.shape[1], photo.shape[0])
        started = time.perf_counter()
        click(float(x), float(y))
        ended = time.perf_counter()
        latencies.append(ended - started)
        if ended > deadline:
            return latencies


def shifted(photo: Photo, number: int) -> Photo:
    """Shift the photo sideways, so that its pixels differ and no cache takes it for the same."""
    return np.ascontiguousarray(np.roll(photo, 7 * number, axis=1))
