"""What becomes of metrics when Triton fails, which the real one does only for want of memory."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
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


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Triton's module, as far as the metrics need it."""
    module: Any = ModuleType("triton_python_backend_utils")
    module.warnings = []
    module.Logger = SimpleNamespace(log_warn=module.warnings.append)
    module.MetricFamily = lambda **_: SimpleNamespace(Metric=lambda **_: Broken())
    for kind in ("GAUGE", "COUNTER", "HISTOGRAM"):
        setattr(module.MetricFamily, kind, kind)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "metrics", raising=False)
    yield module
    sys.modules.pop("metrics", None)


def test_a_failed_update_is_told_once_and_made_up_for(backend: Any) -> None:
    metrics = importlib.import_module("metrics").Metrics(ImageStore(1, 1.0), {})
    try:
        metrics.count_request(3)
        for _ in range(2):
            metrics._publish()
        assert backend.warnings == ["metrics are not up to date: no room in shared memory"]
        Broken.fails = False
        metrics._publish()
        assert metrics._numbers["sam3_objects_total"]._metric.value == 3
    finally:
        Broken.fails = True
        metrics.close()
