from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.accuracy import GATE_TRAINED
from benchmarks.engine import Engine, EngineError
from tests.conftest import DEMO_CHECKPOINT


@pytest.fixture(scope="module")
def engine(repository: Path) -> Iterator[Engine]:
    with Engine(repository, "cpu", checkpoint=DEMO_CHECKPOINT) as running:
        yield running


def test_encoding_and_decoding_take_time(engine: Engine) -> None:
    assert engine.encode() > 0
    assert engine.encode(batch=2) > 0
    assert engine.decode() > 0
    assert engine.decode(objects=3, images=2) > 0


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
