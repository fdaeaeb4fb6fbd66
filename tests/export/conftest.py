"""The tiny model, its checkpoint and its exports."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.export import ExportedProgram

from export import checkpoint
from export.architecture import InteractiveModel
from export.interruption import ENDING
from export.repository import DECODER
from tests.export import tiny


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """The command, run inside the tests, sets handlers for signals that are not ignored.

    Each test starts with none ignored, however pytest was started, such as under nohup.
    """
    before = {number: signal.signal(number, signal.default_int_handler) for number in ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def program(exported: tiny.Export) -> ExportedProgram:
    """The exported decoder's program."""
    return torch.export.load(exported.repository / DECODER / "1" / "decoder.pt2")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.pt"
    tiny.save(path)
    return path


@pytest.fixture(scope="session")
def model(tiny_checkpoint: Path) -> InteractiveModel:
    """Must not be modified."""
    return checkpoint.load(tiny_checkpoint)
