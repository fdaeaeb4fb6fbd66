"""Our encoder and decoder without Triton, in a separate process: what a server cannot beat.

The worker runs the model repository's own decoder, imported as Triton imports it (its folder on the
module path), and measures times inside the process; the handle only sends commands.

    with Engine(repository, "cpu") as engine:
        engine.decode(objects=1)          # seconds of one launch
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from export.repository import DECODER


class EngineError(RuntimeError):
    """The worker failed; the message is its reason."""


class Engine:
    """A worker process; a context manager.

    encoder: "onnxruntime", "tensorrt" (which compiles it inside ONNX Runtime) or "pytorch", which
        needs `checkpoint`.

    Every method raises EngineError with the worker's reason.
    """

    def __init__(
        self,
        repository: Path,
        device: str,
        *,
        encoder: str = "onnxruntime",
        checkpoint: Path | None = None,
    ) -> None:
        config = repository / DECODER / "config.pbtxt"
        if not config.is_file():
            raise EngineError(f"not a model repository: there is no {config}")
        modules = [str(ROOT), str(repository / DECODER / "1"), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, modules))}
        arguments = [str(repository), device, encoder, str(checkpoint or "")]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.engine_worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._receive()

    def encode(self, batch: int = 1) -> float:
        """Seconds to encode a batch; on a GPU, measured by its own clock."""
        return self._ask("encode", batch=batch)

    def decode(self, objects: int = 1, images: int = 1) -> float:
        """Seconds from prompts to masks, for that many objects on each of that many images."""
        return self._ask("decode", objects=objects, images=images)

    def keep(self, images: int) -> float:
        """Bytes of device memory taken by keeping that many images."""
        return self._ask("keep", images=images)

    def mask_iou(self) -> float:
        """The lowest mask IoU against Meta's FP32 modules, over prompts of every kind."""
        return self._ask("mask_iou")

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def _ask(self, method: str, **arguments: Any) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([method, arguments]) + "\n")
        self._process.stdin.flush()
        return self._receive()

    def _receive(self) -> float:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EngineError(f"the worker exited with status {self._process.wait()}")
        answer = json.loads(line)
        if isinstance(answer, str):
            raise EngineError(answer)
        return float(answer)
