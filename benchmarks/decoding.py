"""The decoder's metrics of its own work, from the server's metrics endpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass

from triton_sam3.status import store_metrics

PERIOD = 1.2
"""Seconds; slightly longer than the decoder's update interval."""
SETTLING_SECONDS = 20.0
METRICS_TIMEOUT = 10.0


@dataclass(frozen=True)
class Decoded:
    """What a decoder has counted since it was loaded."""

    launches: int
    seconds: float


def settled(url: str, launches: int = 0) -> Decoded:
    """Wait until that many launches are reported and the count is stable; it updates once a second.

    Raises RuntimeError if it does not get there in time.
    """
    until = time.monotonic() + SETTLING_SECONDS
    last = _decoded(url)
    while time.monotonic() < until:
        time.sleep(PERIOD)
        now = _decoded(url)
        if now == last and now.launches >= launches:
            return now
        last = now
    raise RuntimeError(f"{url} reports {last.launches} launches, expected {launches}")


def _decoded(url: str) -> Decoded:
    metrics = store_metrics(url, METRICS_TIMEOUT)
    return Decoded(int(metrics["sam3_decode_launches_total"]), metrics["sam3_decode_seconds_total"])
