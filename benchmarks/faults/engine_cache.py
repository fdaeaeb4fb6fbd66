"""The engine cache's disk is full: the engine TensorRT writes is truncated, and read at restart.

TensorRT needs a GPU. A model stands in for it: on loading, it writes and reads as the source of
ONNX Runtime's provider does. The server, the disk and the cleanup are the real ones.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.faults import mounts
from benchmarks.faults.bench import Bench
from benchmarks.faults.files import sentence
from benchmarks.faults.stand import Stand
from benchmarks.faults.trial import Result, Trial
from export.accelerator import TENSORRT

DISK_MIB, ENGINE_MIB = 4, 8
CLEARED = "could not be read: its"
ENGINE = "TensorrtExecutionProvider_TRTKernel_graph_main_graph_1_0_0_sm90.engine"
STAND_IN = "sam3_engine"
CONFIG = """\
backend: "python"
max_batch_size: 0
input [ { name: "x" data_type: TYPE_FP32 dims: [ 1 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 1 ] } ]
instance_group [ { kind: KIND_CPU } ]
"""
MODEL = """\
from pathlib import Path

import triton_python_backend_utils as pb_utils

ENGINE = Path({engine!r})
SIZE = {size}


class TritonPythonModel:
    def initialize(self, args):
        if not ENGINE.exists():
            try:
                with ENGINE.open("wb", buffering=0) as file:
                    for _ in range(SIZE // 4096):
                        file.write(bytes(4096))
            except OSError:
                pass  # the provider does not check the stream's state
        elif ENGINE.stat().st_size < SIZE:
            raise pb_utils.TritonModelException(
                "onnx runtime error 11: TensorRT EP could not deserialize engine from cache: "
                + str(ENGINE)
            )
"""


def cache_full(bench: Bench, title: str) -> Result:
    """A server restarted with a truncated engine exits; it must recover without an operator."""
    if mounts.refused():
        return Result(title, skipped="needs root, to give the server its own disk")
    cache = bench.folder() / "sam3_engines"
    cache.mkdir()
    repository = bench.copy()
    add_stand_in(repository, cache)
    with (
        mounts.small_disk(cache, DISK_MIB) as inside,
        Stand(repository, bench.folder(), wrapper=inside) as stand,
    ):
        with Trial(title, stand, bench.questions(stand)) as trial:
            trial.inject(lambda: stand.container.triton().kill())
            trial.recover()
        trial.remark = _failed_start(stand)
        return trial.result()


def add_stand_in(repository: Path, cache: Path) -> None:
    """Add the model that stands in for TensorRT; its config names the cache like the encoder's."""
    version = repository / STAND_IN / "1"
    version.mkdir(parents=True)
    config = CONFIG + TENSORRT.format(cache=cache, profile="")
    (version.parent / "config.pbtxt").write_text(config, encoding="utf-8")
    model = MODEL.format(engine=str(cache / ENGINE), size=ENGINE_MIB << 20)
    (version / "model.py").write_text(model, encoding="utf-8")


def _failed_start(stand: Stand) -> str:
    """Describe the failed start, which clears the cache. Raises RuntimeError unless it is alone."""
    said = [r["message"] for r in stand.container.records() if CLEARED in r["message"]]
    refused = stand.statuses[1:]
    if len(said) != 1 or len(refused) != 1:
        raise RuntimeError(f"exit statuses: {stand.statuses}; messages: {said}")
    refusal = sentence(stand.refusal())
    return f"a model stood in for TensorRT; 1 start rejected: {refusal}"
