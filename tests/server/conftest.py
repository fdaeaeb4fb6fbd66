"""Servers of tiny models; a test that harms a server starts its own."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import pytest

from server import TritonServer
from tests.server import tiny


class Start(Protocol):
    """Start a server that is killed when the test ends."""

    def __call__(self, repository: Path, **options: object) -> TritonServer: ...


@pytest.fixture
def plus_one_repository(tmp_path: Path) -> Path:
    """A repository with one ONNX model, y = x + 1."""
    repository = tmp_path / "models"
    tiny.add_plus_one(repository)
    return repository


@pytest.fixture
def start() -> Iterator[Start]:
    with ExitStack() as running:

        def start_one(repository: Path, **options: object) -> TritonServer:
            server = TritonServer(repository, **options)  # type: ignore[arg-type]
            running.callback(server.kill)
            return server.start()

        yield start_one
