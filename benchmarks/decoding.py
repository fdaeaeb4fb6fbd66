"""The decoder's own account of its work, on the metrics endpoint of its server."""

from __future__ import annotations

import re
import time
import urllib.request
from dataclasses import dataclass

PERIOD = 1.2
"""Seconds, a little more than the decoder's between two updates."""
SETTLING_SECONDS = 20.0
_NUMBER = re.compile(r"^(sam3_\w+)\{.*\} (\S+)$", re.M)


def numbers(url: str) -> dict[str, float]:
    """What it says now, by metric; of a histogram's buckets the last."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(url, timeout=10) as answer:
        return {name: float(value) for name, value in _NUMBER.findall(answer.read().decode())}


@dataclass(frozen=True)
class Decoded:
    """What a decoder has counted since it was loaded."""

    launches: int
    seconds: float


def settled(url: str, launches: int = 0) -> Decoded:
    """Once so many launches are told of, and no more come: it tells once a second.

    Raises RuntimeError when they are not told of.
    """
    until = time.monotonic() + SETTLING_SECONDS
    last = _decoded(url)
    while time.monotonic() < until:
        time.sleep(PERIOD)
        now = _decoded(url)
        if now == last and now.launches >= launches:
            return now
        last = now
    raise RuntimeError(f"{url} tells of {last.launches} launches, not of {launches}")


def _decoded(url: str) -> Decoded:
    told = numbers(url)
    return Decoded(int(told["sam3_decode_launches_total"]), told["sam3_decode_seconds_total"])
