from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.accuracy import GATE_TRAINED
from benchmarks.engine import Engine, EngineError
from tests.conftest import DEMO_CHECKPOINT


@pytest.fixture(scope="module")
def engine(repository: Path) -> Iterator[Engine]:
    with Engine(repository, "cpu", checkpoint=DEMO_CHECKPOINT) as running:
        yield running


def test_more_work_takes_more_time(engine: Engine) -> None:
    """Several times as much; the fastest of five, because the machine may be busy."""

    def fastest(measure: Callable[[], float]) -> float:
        return min(measure() for _ in range(5))

    one_image, one_click = fastest(engine.encode), fastest(engine.decode)
    assert fastest(lambda: engine.encode(batch=8)) > 2 * one_image > 0
    assert fastest(lambda: engine.decode(objects=64)) > 2 * one_click > 0
    assert fastest(lambda: engine.decode(images=16)) > 2 * one_click


def test_the_exported_encoder_is_within_the_gate(engine: Engine) -> None:
    assert engine.mask_iou() >= GATE_TRAINED


def test_the_same_network_in_pytorch_is_within_the_gate(repository: Path) -> None:
    with Engine(repository, "cpu", encoder="pytorch", checkpoint=DEMO_CHECKPOINT) as engine:
        assert engine.mask_iou() >= GATE_TRAINED


def test_a_failure_of_the_worker_is_an_error_with_its_reason(engine: Engine) -> None:
    with pytest.raises(EngineError, match="TypeError"):
        engine._ask("encode", batches=3)
    assert engine.decode() > 0  # and the worker keeps running


def test_a_worker_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"config\.pbtxt"):
        Engine(tmp_path, "cpu")
