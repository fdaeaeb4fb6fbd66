"""Metrics when Triton fails, which the real one does only when it runs out of memory."""

from __future__ import annotations

import importlib
from typing import Any

from store import ImageStore


class Broken:
    """A metric that fails as long as it is told to."""

    fails = True

    def __init__(self) -> None:
        self.value = 0.0

    def increment(self, by: float) -> None:
        if Broken.fails:
            raise RuntimeError("no room in shared memory")
        self.value += by

    set = observe = increment


def test_a_failed_update_is_told_once_and_made_up_for(backend: Any) -> None:
    backend.Metric = Broken
    metrics = importlib.import_module("metrics").Metrics(ImageStore(1, 1.0), {})
    try:
        metrics.count_request(3)
        for _ in range(2):
            metrics._publish()
        assert backend.warnings == ["metrics are not up to date: no room in shared memory"]
        Broken.fails = False
        metrics._publish()
        assert metrics._metrics["sam3_objects_total"]._metric.value == 3
    finally:
        Broken.fails = True
        metrics.close()
