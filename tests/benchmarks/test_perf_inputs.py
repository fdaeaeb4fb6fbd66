"""perf_analyzer's input files against the server's configs."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import perf_inputs
from export.check import PHOTOS
from export.repository import read_config
from server import TritonServer

BYTES = {"TYPE_UINT8": 1, "TYPE_BOOL": 1, "TYPE_FP16": 2, "TYPE_FP32": 4, "TYPE_INT32": 4}
FILES = {
    perf_inputs.ENCODER: "sam3_image_encoder",
    perf_inputs.ENSEMBLE: "sam3_interactive",
    perf_inputs.ALL_INPUTS: "sam3_interactive",
    perf_inputs.WARM: "sam3_prompt_decoder",
    perf_inputs.EMBEDDINGS: "sam3_prompt_decoder",
    perf_inputs.MIXED: "sam3_prompt_decoder",
}


@pytest.fixture(scope="module")
def files(server: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = perf_inputs.write(server.grpc_url, tmp_path_factory.mktemp("perf"))
    return {path.name: path for path in paths}


def test_every_file_is_written(files: dict[str, Path]) -> None:
    assert files.keys() == FILES.keys()


@pytest.mark.parametrize(("name", "model"), FILES.items())
def test_every_request_fits_the_config(
    name: str, model: str, files: dict[str, Path], repository: Path
) -> None:
    config = read_config(repository, model)
    inputs = {tensor.name: tensor for tensor in config.input}
    requests = json.loads(files[name].read_text())["data"]
    assert requests
    for request in requests:
        assert request.keys() <= inputs.keys()
        required = {tensor.name for tensor in config.input if not tensor.optional}
        assert required <= request.keys()
        for tensor, value in request.items():
            _check_tensor(value, inputs[tensor])


def _check_tensor(value: dict[str, Any], config: Any) -> None:
    shape, dims = value["shape"], list(config.dims)
    assert len(shape) == len(dims)
    assert all(dim in (-1, size) for size, dim in zip(shape, dims, strict=True))
    if "content" in value:
        assert len(value["content"]) == math.prod(shape)
        assert all(value["content"])
        return
    kind = type(config).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
    size = BYTES[kind[config.data_type].name]
    assert len(base64.b64decode(value["b64"])) == size * math.prod(shape)


def test_cold_requests_bring_different_photos(files: dict[str, Path]) -> None:
    images = [r["image"]["b64"] for r in json.loads(files[perf_inputs.ENCODER].read_text())["data"]]
    assert len(set(images)) == len(images) == len(PHOTOS)


def test_mixed_requests_take_turns(files: dict[str, Path]) -> None:
    requests = json.loads(files[perf_inputs.MIXED].read_text())["data"]
    assert ["image_id" in request for request in requests] == [True, False] * (len(requests) // 2)


def test_the_file_for_shared_memory_has_all_inputs(
    files: dict[str, Path], repository: Path
) -> None:
    names = {tensor.name for tensor in read_config(repository, "sam3_interactive").input}
    for request in json.loads(files[perf_inputs.ALL_INPUTS].read_text())["data"]:
        assert request.keys() == names
