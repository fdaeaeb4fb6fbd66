"""Failures of the image reader and the mask writer themselves: answered, logged, counted."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from export.repository import READER, WRITER, read_config
from server import TritonServer
from tests.model_repository.asking import connect, file_inputs
from tests.model_repository.test_image_reader import png
from tests.server import tiny
from tests.stubs import stubs
from triton_sam3 import Prompt


@pytest.fixture
def small_server(repository: Path, tmp_path: Path) -> Iterator[TritonServer]:
    """A server of its own, with these two models only."""
    for model in (READER, WRITER):
        shutil.copytree(repository / model, tmp_path / model)
    with TritonServer(tmp_path) as server:
        yield server


@contextmanager
def without_memory(processes: list[psutil.Process]) -> Iterator[None]:
    """They may take no more than 60 MB in addition to what they have."""
    for process in processes:
        limit = process.memory_info().vms + 60_000_000
        process.rlimit(psutil.RLIMIT_AS, (limit, psutil.RLIM_INFINITY))
    try:
        yield
    finally:
        for process in processes:
            process.rlimit(psutil.RLIMIT_AS, (psutil.RLIM_INFINITY,) * 2)


def failures(server: TritonServer) -> dict[str, float]:
    series = re.findall(
        r'^sam3_failures_total\{model="(\w+)",.*\} (\S+)$', tiny.get(server.metrics_url), re.M
    )
    return {model: float(value) for model, value in series}


def test_a_lack_of_memory_is_the_servers_failure(
    small_server: TritonServer, repository: Path
) -> None:
    side = read_config(repository, WRITER).input[0].dims[-1]
    large: dict[str, dict[str, NDArray[Any]]] = {
        READER: file_inputs(png(6_000, 6_000, rows=6_000), [Prompt(points=[(2, 1)])]),
        WRITER: {
            "low_res_masks": np.ones((1, 1, 1, side, side), np.float16),
            "iou_predictions": np.ones((1, 1, 1), np.float32),
            "image_size": np.array([[6_000, 6_000]], np.int32),
        },
    }
    assert failures(small_server) == {READER: 0, WRITER: 0}
    with connect(small_server.grpc_url.removeprefix("grpc://")) as ask:
        for model, inputs in large.items():
            fails = pytest.raises(InferenceServerException, match="the server's log says why")
            with without_memory(stubs(small_server, model)), fails:
                ask(model, **inputs)
            assert ask(model, **inputs)
    expected = {READER: 1, WRITER: 1}
    assert tiny.wait_for(lambda: failures(small_server) == expected, 10), failures(small_server)
    assert re.search("MemoryError", small_server.read_log())
