"""What every test stands on: the demo checkpoint, exported once, under one real tritonserver."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from server import TritonServer

ROOT = Path(__file__).resolve().parent.parent
DEMO_CHECKPOINT = ROOT / "demo" / "checkpoint.pt"


def pytest_configure() -> None:
    """Ctrl-C means Ctrl-C in what the tests start.

    A shell starts a background job with SIGINT ignored, and every child inherits that: the
    programs under test would then never see the interrupt a test sends them.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint as a model repository, exported and checked in FP32."""
    from export.pipeline import export_repository

    output = tmp_path_factory.mktemp("export") / "models"
    export_repository(DEMO_CHECKPOINT, output)
    return output


@pytest.fixture(scope="session")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """The demo model under a real tritonserver; a test that harms a server starts its own."""
    log = tmp_path_factory.mktemp("server") / "tritonserver.log"
    with TritonServer(repository, log=log) as running:
        yield running
        running.kill()  # an orderly end takes seconds, and has tests of its own
