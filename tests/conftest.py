"""What every test stands on: the demo checkpoint, exported once, under one real tritonserver."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from filelock import FileLock

import export  # noqa: F401 - before ONNX Runtime, which it keeps from reporting
from server import TritonServer

if TYPE_CHECKING:
    from tests.export import tiny  # with Meta's code: seconds

ROOT = Path(__file__).resolve().parent.parent
DEMO_CHECKPOINT = ROOT / "demo" / "checkpoint.pt"
LONG = ("demo/test_main.py", "demo/test_train.py", "test_readme.py", "benchmarks/test_peers.py")
"""Files of minutes each."""


def pytest_configure() -> None:
    """Ctrl-C means Ctrl-C in what the tests start, and models of their size have one thread.

    A shell starts a background job with SIGINT ignored, and every child inherits that: the
    programs under test would then never see the interrupt a test sends them. So small a model
    only waits for its threads, most of all beside another worker's. No proxy of the environment
    is asked for a server on this machine.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that in the end no worker has one to itself; a rule is one row."""
    long = {ROOT / "tests" / name for name in LONG}
    items.sort(key=lambda item: item.path not in long)
    rules: dict[str, tuple[str, ...]] = {}
    for item in items:
        for mark in item.iter_markers("semantic"):
            _, rule, _ = mark.args
            if rules.setdefault(rule, mark.args) != mark.args:
                raise pytest.UsageError(f"{item.nodeid}: the rule {rule!r} stands in two rows")


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run, the same for all its workers."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def repository(run_folder: Path) -> Path:
    """The demo checkpoint as a model repository, exported and checked in FP32, once for all."""
    from export.pipeline import export_repository

    output = run_folder / "demo" / "models"
    with FileLock(run_folder / "demo.lock"):
        if not output.exists():
            export_repository(DEMO_CHECKPOINT, output)
    return output


@pytest.fixture(scope="session")
def exported(run_folder: Path) -> tiny.Export:
    """The tiny model, exported in FP32."""
    from tests.export import tiny

    return tiny.export_once(run_folder / "tiny-fp32", "fp32")


@pytest.fixture(scope="session")
def exported_fp16(run_folder: Path) -> tiny.Export:
    """In FP16."""
    from tests.export import tiny

    return tiny.export_once(run_folder / "tiny-fp16", "fp16")


@pytest.fixture(scope="session")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """The demo model under a real tritonserver; a test that harms a server starts its own."""
    log = tmp_path_factory.mktemp("server") / "tritonserver.log"
    with TritonServer(repository, log=log) as running:
        yield running
        running.kill()  # an orderly end takes seconds, and has tests of its own
