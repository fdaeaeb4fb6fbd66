"""The decoder's own metrics on Triton's metrics endpoint.

Answering a request only updates counters here; a thread reports them to Triton once a second, since
every update is a message to another process. The thread also evicts idle images when no request
comes to do that.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import triton_python_backend_utils as pb_utils
from store import ImageStore

PERIOD_SECONDS = 1.0
OBJECTS_BUCKETS = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0]


class Metrics:
    """Counters, and the thread that publishes them until `close`."""

    def __init__(self, store: ImageStore, labels: Mapping[str, str]) -> None:
        self._store = store
        self._objects = 0
        self._launches = 0
        self._seconds = 0.0
        self._failures = 0
        self._requests: deque[int] = deque()
        self._failed = False
        self._metrics = self._declare(store)
        for name, metric in self._metrics.items():
            metric.open(name, labels)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def _declare(self, store: ImageStore) -> dict[str, _Metric]:
        counts, kept = store.counts, "sam3_kept_images"
        return {
            kept: _Gauge("Images kept for later clicks", lambda: len(store)),
            f"{kept}_bytes": _Gauge("Memory used by kept images", lambda: store.nbytes),
            f"{kept}_hits_total": _Counter("Image ids found in the store", lambda: counts.hits),
            f"{kept}_misses_total": _Counter(
                "Image ids not found in the store", lambda: counts.misses
            ),
            f"{kept}_evictions_total": _Counter(
                "Images evicted, idle or to make room", lambda: counts.evictions
            ),
            "sam3_failures_total": _Counter("Valid requests that failed", lambda: self._failures),
            "sam3_objects_total": _Counter("Objects decoded and answered", lambda: self._objects),
            "sam3_objects_per_request": _Histogram("Objects per request", lambda: self._requests),
            "sam3_decode_seconds_total": _Counter("Time spent decoding", lambda: self._seconds),
            "sam3_decode_launches_total": _Counter(
                "Runs of the decoder's program, each on many objects", lambda: self._launches
            ),
        }

    def count_request(self, objects: int) -> None:
        """Count a request answered with the masks of this many objects."""
        self._objects += objects
        self._requests.append(objects)

    def count_decoding(self, seconds: float, launches: int) -> None:
        """Count `launches` runs of the decoder's program in `seconds`."""
        self._seconds += seconds
        self._launches += launches

    def count_failure(self) -> None:
        """Count a request with valid prompts that failed: Triton counts it as answered."""
        self._failures += 1

    def close(self) -> None:
        """Stop the thread and remove the metrics from the endpoint."""
        self._stopped.set()
        self._thread.join()
        for metric in self._metrics.values():
            metric.close()

    def _run(self) -> None:
        while not self._stopped.wait(PERIOD_SECONDS):
            self._store.sweep()
            self._publish()

    def _publish(self) -> None:
        """Publish every metric; one that fails, as without shared memory, is retried next time."""
        failed = ""
        for metric in self._metrics.values():
            try:
                metric.publish()
            except Exception as error:  # Triton has exception types of its own
                failed = str(error)
        if failed and not self._failed:  # once, not every second
            pb_utils.Logger.log_warn(f"metrics are not up to date: {failed}")
        self._failed = bool(failed)


class _Metric:
    """One metric and the source of its value."""

    kind: str
    """A name: Triton adds the kinds to its module only after this one is imported."""
    options: Mapping[str, Any] = {}

    def __init__(self, description: str, value: Callable[[], Any]) -> None:
        self._description = description
        self._value = value
        self._published = 0.0

    def open(self, name: str, labels: Mapping[str, str]) -> None:
        kind = getattr(pb_utils.MetricFamily, self.kind)
        self._family = pb_utils.MetricFamily(name=name, description=self._description, kind=kind)
        self._metric = self._family.Metric(labels=dict(labels), **self.options)

    def publish(self) -> None:
        value = self._value()
        if value != self._published:
            self._send(value)
            self._published = value

    def _send(self, value: Any) -> None:
        raise NotImplementedError

    def close(self) -> None:
        del self._metric  # must be deleted before its family
        del self._family


class _Gauge(_Metric):
    kind = "GAUGE"

    def _send(self, value: float) -> None:
        self._metric.set(value)


class _Counter(_Metric):
    kind = "COUNTER"

    def _send(self, value: float) -> None:
        self._metric.increment(value - self._published)


class _Histogram(_Metric):
    """A histogram whose value is the queue of observations, from which it takes what it sends."""

    kind = "HISTOGRAM"
    options: Mapping[str, Any] = {"buckets": OBJECTS_BUCKETS}

    def publish(self) -> None:
        waiting = self._value()
        while waiting:
            self._metric.observe(waiting[0])
            waiting.popleft()
