"""Metrics when Triton fails, which the real one does only without memory, and idle images."""

from __future__ import annotations

import importlib
import threading
from typing import Any

import pytest
from store import ImageStore


class Broken:
    """A metric that fails as long as it is told to."""

    fails = True

    def __init__(self) -> None:
        self.value = 0.0
        self.observed: list[float] = []

    def observe(self, value: float) -> None:
        self.increment(1)
        self.observed.append(value)

    def increment(self, by: float) -> None:
        if Broken.fails:
            raise RuntimeError("no room in shared memory")
        self.value += by

    set = increment


def test_a_failed_update_is_logged_once_and_made_up_for(backend: Any) -> None:
    backend.Metric = Broken
    metrics = importlib.import_module("metrics").Metrics(ImageStore(1, 1.0), {})
    try:
        for objects in (3, 5):
            metrics.count_request(objects)
        for _ in range(2):
            metrics._publish()
        assert backend.warnings == ["metrics are not up to date: no room in shared memory"]
        Broken.fails = False
        for _ in range(2):
            metrics._publish()
        assert metrics._metrics["sam3_objects_total"]._metric.value == 8
        assert metrics._metrics["sam3_objects_per_request"]._metric.observed == [3, 5]
    finally:
        Broken.fails = True
        metrics.close()


def test_idle_images_are_evicted_without_a_request(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.Metric = Broken
    module = importlib.import_module("metrics")
    swept, store = threading.Event(), ImageStore(1, 1.0)
    monkeypatch.setattr(module, "PERIOD_SECONDS", 0.01)
    monkeypatch.setattr(store, "sweep", swept.set)
    metrics = module.Metrics(store, {})
    try:
        assert swept.wait(20)
    finally:
        metrics.close()
