"""Triton's `onnxruntime` backend for servers that have only the Python backend.

A Python-based backend: Triton finds this file where it looks for the C++ backend's library, so a
model with `backend: "onnxruntime"` and `1/model.onnx` loads as it does with the C++ backend.

    requests of one batch ── concatenated ── one session run ── split ── responses

It supports the following settings of `config.pbtxt` that the C++ backend reads:
`default_model_filename`, `optimization { graph { level } }`, the GPU execution accelerators `cuda`
and `tensorrt` with the options that have the same names in ONNX Runtime, and the parameters
`intra_op_thread_count`, `inter_op_thread_count`, `execution_mode`, `enable_mem_arena` and
`enable_mem_pattern`. Unlike in the C++ backend, a request that fails never fails the requests it
was batched with.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import triton_python_backend_utils as pb_utils
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

Arrays = Mapping[str, npt.NDArray[Any]]
Result = Arrays | Exception
Config = Mapping[str, Any]

ONNX_TYPES = {
    "TYPE_BOOL": "tensor(bool)",
    "TYPE_UINT8": "tensor(uint8)",
    "TYPE_INT8": "tensor(int8)",
    "TYPE_INT16": "tensor(int16)",
    "TYPE_INT32": "tensor(int32)",
    "TYPE_INT64": "tensor(int64)",
    "TYPE_FP16": "tensor(float16)",
    "TYPE_FP32": "tensor(float)",
    "TYPE_FP64": "tensor(double)",
}
GRAPH_LEVELS = {
    -1: ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    0: ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    1: ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
EXECUTION_MODES = {
    0: ort.ExecutionMode.ORT_SEQUENTIAL,
    1: ort.ExecutionMode.ORT_PARALLEL,
}
SWITCH = {0: False, 1: True}
GPU_ACCELERATOR = "gpu_execution_accelerator"
GPU_PROVIDERS = {"tensorrt": "TensorrtExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""In the order in which ONNX Runtime tries them for a node."""


class TritonPythonModel:
    """One instance of one ONNX model."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the model; a TritonModelException's sentence is what the server reports."""
        config = json.loads(args["model_config"])
        filename = config.get("default_model_filename") or "model.onnx"
        path = Path(args["model_repository"], args["model_version"], filename)
        try:
            self._session = load_session(path, config, args)
            check_signature(self._session, config)
        except ValueError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        self._batches = config["max_batch_size"] > 0
        self._inputs = [entry["name"] for entry in config["input"]]
        self._outputs = [entry["name"] for entry in config["output"]]

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer every request, in order, with outputs or with its own error."""
        feeds = [self._read(request) for request in requests]
        asked = [set(request.requested_output_names()) for request in requests]
        wanted = [name for name in self._outputs if any(name in names for names in asked)]
        results = self._run_together(feeds, wanted) or [self._run(feed, wanted) for feed in feeds]
        return [respond(result, names) for result, names in zip(results, asked, strict=True)]

    def _read(self, request: Any) -> Arrays:
        """Views of the request's tensors; optional inputs may be absent."""
        tensors = {n: pb_utils.get_input_tensor_by_name(request, n) for n in self._inputs}
        return {name: tensor.as_numpy() for name, tensor in tensors.items() if tensor is not None}

    def _run_together(self, feeds: Sequence[Arrays], wanted: Sequence[str]) -> list[Result] | None:
        """One run for all; None if that fails, so that each request gets its own error."""
        alike = all(feed.keys() == feeds[0].keys() for feed in feeds)
        if len(feeds) == 1 or not (self._batches and alike):
            return None
        try:
            merged = {n: np.concatenate([feed[n] for feed in feeds]) for n in feeds[0]}
            outputs = dict(zip(wanted, self._session.run(wanted, merged), strict=True))
            return split(outputs, [len(next(iter(feed.values()))) for feed in feeds])
        except Exception as error:
            pb_utils.Logger.log_warn(f"{len(feeds)} requests failed together: {error}")
            return None

    def _run(self, feed: Arrays, wanted: Sequence[str]) -> Result:
        try:
            return dict(zip(wanted, self._session.run(wanted, feed), strict=True))
        except Exception as error:
            return error


def load_session(path: Path, config: Config, args: Mapping[str, str]) -> ort.InferenceSession:
    """Open the model on the instance's device. Raises ValueError."""
    if not path.is_file():
        raise ValueError(f"there is no {path.name} in {path.parent}")
    providers = choose_providers(
        args["model_instance_kind"], args["model_instance_device_id"], accelerators(config)
    )
    options = session_options(config)
    if len(providers) > 1:
        ort.preload_dlls()  # CUDA's libraries in NVIDIA's packages, which it does not search
    try:
        # Its own fallback would open the model on the CPU without any notice.
        session = ort.InferenceSession(path, options, providers=providers, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise ValueError(f"ONNX Runtime cannot load it: {error}") from error
    check_providers(providers, session.get_providers())
    return session


def check_providers(wanted: Sequence[Any], loaded: Sequence[str]) -> None:
    """Raise ValueError if a wanted provider could not be loaded."""
    names = [one if isinstance(one, str) else one[0] for one in wanted]
    if missing := [name for name in names if name not in loaded]:
        raise ValueError(
            f"ONNX Runtime could not load {' and '.join(missing)}: CUDA's libraries are missing or "
            "of another version (its own log says which); install them, or export with "
            "--accelerator cpu"
        )


def accelerators(config: Config) -> dict[str, dict[str, str]]:
    """The GPU execution accelerators by name, each with its options. Raises ValueError."""
    chosen = config.get("optimization", {}).get("execution_accelerators", {})
    options = {one["name"]: one.get("parameters", {}) for one in chosen.get(GPU_ACCELERATOR, [])}
    if unknown := options.keys() - GPU_PROVIDERS.keys():
        raise ValueError(f"{GPU_ACCELERATOR} must be one of {list(GPU_PROVIDERS)}, not {unknown}")
    return options


def choose_providers(kind: str, device: str, options: Mapping[str, Any]) -> list[Any]:
    """For a GPU instance, TensorRT if the config asks for it, then CUDA, then the CPU.

    Providers that this ONNX Runtime was built without are left out, with a warning in the log.
    """
    cpu = "CPUExecutionProvider"
    if kind != "GPU":
        return [cpu]
    wanted = [name for name in GPU_PROVIDERS if name in options or name == "cuda"]
    available = ort.get_available_providers()
    missing = [name for name in wanted if GPU_PROVIDERS[name] not in available]
    if missing:
        pb_utils.Logger.log_warn(f"this onnxruntime was built without {' and '.join(missing)}")
    return [
        *(
            (GPU_PROVIDERS[name], {"device_id": device, **with_booleans(options.get(name, {}))})
            for name in wanted
            if name not in missing
        ),
        cpu,
    ]


def with_booleans(options: Mapping[str, str]) -> dict[str, str]:
    """The options with switches as True or False: ONNX Runtime's Python API takes no numbers."""
    words = {"0": "False", "1": "True"}
    return {k: words.get(v, v) if k.endswith("_enable") else v for k, v in options.items()}


def session_options(config: Config) -> ort.SessionOptions:
    """Translate the config's optimization level and parameters. Raises ValueError."""
    options = ort.SessionOptions()
    level = int(config.get("optimization", {}).get("graph", {}).get("level", 0))
    options.graph_optimization_level = lookup(GRAPH_LEVELS, level, "optimization.graph.level")
    options.intra_op_num_threads = max(0, parameter(config, "intra_op_thread_count", 0))
    options.inter_op_num_threads = max(0, parameter(config, "inter_op_thread_count", 0))
    mode = parameter(config, "execution_mode", 0)
    options.execution_mode = lookup(EXECUTION_MODES, mode, "execution_mode")
    arena = parameter(config, "enable_mem_arena", 1)
    options.enable_cpu_mem_arena = lookup(SWITCH, arena, "enable_mem_arena")
    # Otherwise its threads keep spinning for a while after a run, on the cores that the next model
    # of an ensemble needs: a one-shot request took twice as long.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    pattern = parameter(config, "enable_mem_pattern", 1)
    options.enable_mem_pattern = lookup(SWITCH, pattern, "enable_mem_pattern")
    return options


def parameter(config: Config, key: str, default: int) -> int:
    """An integer from the config's `parameters`."""
    text = config.get("parameters", {}).get(key, {}).get("string_value", str(default))
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"parameter {key} must be an integer, not {text!r}") from None


def lookup(choices: Mapping[int, Any], value: int, name: str) -> Any:
    """`choices[value]`, or a ValueError that lists what is accepted."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {sorted(choices)}, not {value}")
    return choices[value]


def check_signature(session: ort.InferenceSession, config: Config) -> None:
    """Raise ValueError naming every difference between the graph and `config.pbtxt`."""
    batched = config["max_batch_size"] > 0
    problems = []
    for kind, nodes in (("input", session.get_inputs()), ("output", session.get_outputs())):
        graph = {node.name: node for node in nodes}
        for entry in config[kind]:
            node = graph.pop(entry["name"], None)
            problem = compare(entry, node, batched) if node else "not in the graph"
            if problem:
                problems.append(f"{kind} {entry['name']}: {problem}")
        if kind == "input":  # outputs may be left out, but every input needs a value
            problems += [f"input {name}: not in config.pbtxt" for name in graph]
    if problems:
        raise ValueError("config.pbtxt and the ONNX graph differ: " + "; ".join(problems))


def compare(entry: Config, node: Any, batched: bool) -> str:
    """Describe how a config's tensor and the graph's differ, or return ''."""
    dims = [int(dim) for dim in entry.get("reshape", {}).get("shape", entry["dims"])]
    expected = [-1, *dims] if batched else dims
    shape = [dim if isinstance(dim, int) else -1 for dim in node.shape]
    data_type = ONNX_TYPES.get(entry["data_type"])
    if data_type is None:
        return f"{entry['data_type']} is not supported, only {', '.join(ONNX_TYPES)}"
    same = len(shape) == len(expected) and all(
        inner in (-1, outer) for inner, outer in zip(shape, expected, strict=True)
    )
    if same and node.type == data_type:
        return ""
    return f"{data_type} {expected} in config.pbtxt, {node.type} {shape} in the graph"


def split(outputs: Arrays, counts: Sequence[int]) -> list[Result]:
    """Views of each request's share of the batch. Raises ValueError."""
    if any(len(array) != sum(counts) for array in outputs.values()):
        raise ValueError("the graph's outputs and inputs differ in batch size")
    edges = np.cumsum([0, *counts])
    return [
        {name: array[start:end] for name, array in outputs.items()}
        for start, end in pairwise(edges)
    ]


def respond(result: Result, asked: set[str]) -> Any:
    """A response with the requested outputs, or with the error."""
    if isinstance(result, Exception):
        invalid = isinstance(result, InvalidArgument)
        code = pb_utils.TritonError.INVALID_ARG if invalid else pb_utils.TritonError.INTERNAL
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(result), code))
    return pb_utils.InferenceResponse(
        [pb_utils.Tensor(name, array) for name, array in result.items() if name in asked]
    )
