"""Tiny models for a real tritonserver, and what to look for after it has exited."""

import os
import re
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import onnx
from onnx import TensorProto, helper

from server.command import ENVIRONMENT

SLOW = "import time; time.sleep(600)"
FAILING = "raise RuntimeError('no luck today')"

Tensors = Mapping[str, tuple[str, Sequence[int]]]
"""Name -> Triton's data type and the dims without the batch."""

_ONNX_TYPES = {
    "TYPE_BOOL": TensorProto.BOOL,
    "TYPE_UINT8": TensorProto.UINT8,
    "TYPE_INT32": TensorProto.INT32,
    "TYPE_INT64": TensorProto.INT64,
    "TYPE_FP16": TensorProto.FLOAT16,
    "TYPE_FP32": TensorProto.FLOAT,
}


def config(
    backend: str,
    inputs: Tensors,
    outputs: Tensors,
    *,
    batch: int = 8,
    instances: str = "instance_group [ { kind: KIND_CPU count: 1 } ]",
    more: str = "",
) -> str:
    """A config.pbtxt with one instance on the CPU."""
    return "\n".join(
        [
            f'backend: "{backend}"',
            f"max_batch_size: {batch}",
            *(_entry("input", name, *spec) for name, spec in inputs.items()),
            *(_entry("output", name, *spec) for name, spec in outputs.items()),
            instances,
            more,
        ]
    )


def _entry(kind: str, name: str, data_type: str, dims: Sequence[int]) -> str:
    return f'{kind} [ {{ name: "{name}" data_type: {data_type} dims: {list(dims)} }} ]'


def graph(
    nodes: Sequence[onnx.NodeProto],
    inputs: Tensors,
    outputs: Tensors,
    *,
    batch: Sequence[str | int] = ("batch",),
    constants: Sequence[onnx.TensorProto] = (),
) -> onnx.ModelProto:
    """An ONNX model; every tensor starts with the dims of `batch`."""

    def declare(tensors: Tensors) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(name, _ONNX_TYPES[kind], [*batch, *dims])
            for name, (kind, dims) in tensors.items()
        ]

    body = helper.make_graph(nodes, "tiny", declare(inputs), declare(outputs), constants)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def add_model(
    repository: Path,
    name: str,
    text: str,
    *,
    onnx_model: onnx.ModelProto | None = None,
    python: str | None = None,
    filename: str = "model.onnx",
) -> None:
    """Write a model of one version into `repository`."""
    version = repository / name / "1"
    version.mkdir(parents=True)
    (repository / name / "config.pbtxt").write_text(text)
    if onnx_model is not None:
        onnx.save(onnx_model, version / filename)
    if python is not None:
        (version / "model.py").write_text(python)


X: Tensors = {"x": ("TYPE_FP32", [3])}
Y: Tensors = {"y": ("TYPE_FP32", [3])}


def plus_one(batch: Sequence[str | int] = ("batch",)) -> onnx.ModelProto:
    """y = x + 1 for FP32 [batch, 3]."""
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    return graph([helper.make_node("Add", ["x", "one"], ["y"])], X, Y, batch=batch, constants=[one])


def add_plus_one(repository: Path, name: str = "plus_one") -> None:
    """A model that works, in ONNX."""
    add_model(repository, name, config("onnxruntime", X, Y), onnx_model=plus_one())


def add_python(repository: Path, name: str, initialize: str) -> None:
    """A model whose `initialize` is the given statement, in Python."""
    source = f"class TritonPythonModel:\n    def initialize(self, args):\n        {initialize}\n"
    add_model(repository, name, config("python", X, Y), python=source)


@dataclass(frozen=True)
class Traces:
    """What a running tritonserver leaves behind unless it is cleaned up."""

    session: int
    keeper: int
    shm_prefix: str
    work_dir: Path

    @classmethod
    def of(cls, pid: int) -> "Traces":
        """Read them from tritonserver's command line."""
        text = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", "\n")
        shm_prefix = re.search(r"shm-region-prefix-name=(\S+)", text)
        backends = re.search(r"--backend-directory=(\S+)", text)
        keeper = re.search(r"^PPid:\s*(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M)
        assert shm_prefix and backends and keeper
        return cls(pid, int(keeper[1]), shm_prefix[1], Path(backends[1]).parent)

    def processes(self) -> list[int]:
        """tritonserver, its stubs and its keeper, if running."""
        present = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        family = [pid for pid in present if pid == self.keeper or _session(pid) == self.session]
        return [pid for pid in family if runs(pid)]

    def regions(self) -> list[Path]:
        """Shared memory regions of the Python backend."""
        return list(Path("/dev/shm").glob(f"{self.shm_prefix}*"))

    def left(self) -> list[str]:
        """Everything that still exists."""
        folder = [str(self.work_dir)] if self.work_dir.exists() else []
        return [*map(str, self.processes()), *map(str, self.regions()), *folder]

    def gone_within(self, seconds: float) -> bool:
        """Whether nothing is left, waiting for that if need be."""
        return wait_for(lambda: not self.left(), seconds)


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def runs(pid: int) -> bool:
    """Not a zombie that only its parent can remove."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(pid: int) -> list[int]:
    """Process ids below `pid`."""
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


Found = TypeVar("Found")


def wait_for(find: Callable[[], Found], seconds: float) -> Found:
    """`find()` as soon as it is true, or its last answer when the time is up."""
    deadline = time.monotonic() + seconds
    while not (found := find()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def get(url: str) -> str:
    """The body at a URL of the server, over no proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=5) as response:
        return str(response.read().decode())


def environment() -> dict[str, str]:
    """What a server has of `ENVIRONMENT`: the caller's own values come first."""
    return {name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()}
