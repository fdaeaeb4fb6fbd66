"""server/backends/onnxruntime/model.py, mostly through a real tritonserver."""

import importlib.util
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from server import StartError, TritonServer
from tests.client.statistics import STANDS_STILL_SECONDS
from tests.conftest import ROOT
from tests.server import tiny

Array = npt.NDArray[Any]

ALL_TYPES: tiny.Tensors = {
    name: (f"TYPE_{name.upper()}", [2])
    for name in ("bool", "uint8", "int32", "int64", "fp16", "fp32")
}
VALUES: Mapping[str, Array] = {
    "bool": np.array([[True, False]]),
    "uint8": np.array([[0, 255]], np.uint8),
    "int32": np.array([[-(2**31), 2**31 - 1]], np.int32),
    "int64": np.array([[-(2**63), 2**63 - 1]], np.int64),
    "fp16": np.array([[6e-8, -65504]], np.float16),
    "fp32": np.array([[1e-45, 3.4e38]], np.float32),
}
INDEX: tiny.Tensors = {"index": ("TYPE_INT32", [1])}
LOOKED_UP: tiny.Tensors = {"value": ("TYPE_FP32", [1]), "rows": ("TYPE_INT64", [1])}
TABLE = np.array([10, 20, 30, 40], np.float32)
MERGE_FOUR = (
    "dynamic_batching { preferred_batch_size: [ 4 ] max_queue_delay_microseconds: 60000000 }"
)
TUNED = (
    "optimization { graph { level: 1 } }\n"
    'default_model_filename: "net.onnx"\n'
    'parameters { key: "intra_op_thread_count" value: { string_value: "1" } }\n'
    'parameters { key: "inter_op_thread_count" value: { string_value: "1" } }\n'
    'parameters { key: "execution_mode" value: { string_value: "1" } }\n'
)


def lookup_table() -> Any:
    """value = TABLE[index], which fails while running for one outside; rows = rows in this run."""
    nodes = [
        helper.make_node("Gather", ["table", "index"], ["value"]),
        helper.make_node("Shape", ["index"], ["shape"]),
        helper.make_node("Gather", ["shape", "first"], ["count"]),
        helper.make_node("Expand", ["count", "shape"], ["rows"]),
    ]
    constants = [
        helper.make_tensor("table", TensorProto.FLOAT, [len(TABLE)], TABLE),
        helper.make_tensor("first", TensorProto.INT64, [1], [0]),
    ]
    return tiny.graph(nodes, INDEX, LOOKED_UP, constants=constants)


def same_in_all_types() -> Any:
    nodes = [helper.make_node("Identity", [name], [f"same_{name}"]) for name in ALL_TYPES]
    return tiny.graph(nodes, ALL_TYPES, renamed(ALL_TYPES))


def renamed(tensors: tiny.Tensors) -> tiny.Tensors:
    return {f"same_{name}": spec for name, spec in tensors.items()}


@pytest.fixture(scope="module")
def tiny_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("models")
    everything = tiny.config("onnxruntime", ALL_TYPES, renamed(ALL_TYPES))
    tiny.add_model(folder, "types", everything, onnx_model=same_in_all_types())
    merging = tiny.config("onnxruntime", INDEX, LOOKED_UP, more=MERGE_FOUR)
    tiny.add_model(folder, "table", merging, onnx_model=lookup_table())
    unbatched = tiny.config("onnxruntime", tiny.X, tiny.Y, batch=0)
    tiny.add_model(folder, "unbatched", unbatched, onnx_model=tiny.plus_one(batch=()))
    tuned = tiny.config("onnxruntime", tiny.X, tiny.Y, more=TUNED)
    tiny.add_model(folder, "tuned", tuned, onnx_model=tiny.plus_one(), filename="net.onnx")
    running = TritonServer(folder)
    try:
        yield running.start()
    finally:
        running.kill()


@pytest.fixture
def client(tiny_server: TritonServer) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(tiny_server.http_url.split("://")[1], concurrency=4) as connected:
        yield connected


def tensor(name: str, array: Array) -> InferInput:
    made = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    made.set_data_from_numpy(array)
    return made


def x(*values: float, batch: bool = True) -> InferInput:
    return tensor("x", np.array([values] if batch else values, np.float32))


def test_every_type_comes_back_bit_for_bit(client: InferenceServerClient) -> None:
    result = client.infer("types", [tensor(name, array) for name, array in VALUES.items()])
    for name, array in VALUES.items():
        answer = result.as_numpy(f"same_{name}")
        assert answer.dtype == array.dtype
        assert answer.tobytes() == array.tobytes()


def test_only_requested_outputs_are_returned(client: InferenceServerClient) -> None:
    inputs = [tensor(name, array) for name, array in VALUES.items()]
    result = client.infer("types", inputs, outputs=[InferRequestedOutput("same_int64")])
    assert [output["name"] for output in result.get_response()["outputs"]] == ["same_int64"]


def test_a_batch(client: InferenceServerClient) -> None:
    batch = np.arange(24, dtype=np.float32).reshape(8, 3)
    assert (client.infer("tuned", [tensor("x", batch)]).as_numpy("y") == batch + 1).all()


def test_a_model_without_a_batch(client: InferenceServerClient) -> None:
    result = client.infer("unbatched", [x(1, 2, 3, batch=False)])
    assert result.as_numpy("y").tolist() == [2, 3, 4]


def look_up_together(
    client: InferenceServerClient, *requests: Sequence[int]
) -> list[tuple[list[float], list[int]] | InferenceServerException]:
    """Send requests that wait for each other; the values and the rows, or the error, of each."""
    before = executions(client)
    pending = [
        client.async_infer("table", [tensor("index", np.array(indices, np.int32)[:, None])])
        for indices in requests
    ]
    answers = [_outcome(request) for request in pending]
    assert executions(client) == before + 1, "they did not reach the backend together"
    return answers


def _outcome(request: Any) -> tuple[list[float], list[int]] | InferenceServerException:
    try:
        result = request.get_result()
    except InferenceServerException as error:
        return error
    return result.as_numpy("value")[:, 0].tolist(), result.as_numpy("rows")[:, 0].tolist()


def executions(client: InferenceServerClient) -> int:
    """How many batches the server has passed to the backend, including failed ones.

    Read until it stops changing: Triton counts after it has answered.
    """
    before, count = -1, _executions(client)
    while before != count:
        time.sleep(STANDS_STILL_SECONDS)
        before, count = count, _executions(client)
    return count


def _executions(client: InferenceServerClient) -> int:
    text = tiny.get(f"http://{client._parsed_url.netloc}/v2/models/table/stats")
    counts = json.loads(text)["model_stats"][0]
    return sum(int(batch["compute_input"]["count"]) for batch in counts["batch_stats"])


def test_requests_run_together_and_each_gets_its_own_outputs(client: InferenceServerClient) -> None:
    assert look_up_together(client, [3], [0, 1], [2]) == [
        ([40], [4]),
        ([10, 20], [4, 4]),
        ([30], [4]),
    ]


def test_a_bad_request_fails_alone(client: InferenceServerClient) -> None:
    good, bad, *rest = look_up_together(client, [1], [7], [2], [0])
    assert [good, *rest] == [([20], [1]), ([30], [1]), ([10], [1])]
    assert isinstance(bad, InferenceServerException)
    assert "indices element out of data bounds" in str(bad)


def test_intra_op_thread_count_is_honoured(tiny_server: TritonServer) -> None:
    threads = {
        name: len(list(Path(f"/proc/{pid}/task").iterdir()))
        for pid in tiny.children(tiny_server.pid)
        for name in ("tuned_0_0", "unbatched_0_0")
        if name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    }
    # By default, ONNX Runtime adds one thread per further core to the calling one.
    assert threads["unbatched_0_0"] - threads["tuned_0_0"] == physical_cores() - 1


def physical_cores() -> int:
    """Cores as ONNX Runtime counts them by default: all, even those this process may not use."""
    siblings = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings")
    return len({path.read_text() for path in siblings})


@pytest.mark.parametrize(
    ("text", "model", "reason"),
    [
        pytest.param(
            tiny.config("onnxruntime", {"x": ("TYPE_FP16", [4])}, {"z": ("TYPE_FP32", [3])}),
            tiny.plus_one(),
            "config.pbtxt and the ONNX graph differ: "
            "input x: tensor(float16) [-1, 4] in config.pbtxt, tensor(float) [-1, 3] in the graph; "
            "output z: not in the graph",
            id="another signature",
        ),
        pytest.param(
            tiny.config("onnxruntime", tiny.X, tiny.Y),
            None,
            "there is no model.onnx in ",
            id="no graph",
        ),
    ],
)
def test_a_model_that_cannot_be_loaded_is_an_error_with_the_reason(
    tmp_path: Path, text: str, model: Any, reason: str
) -> None:
    tiny.add_model(tmp_path, "broken", text, onnx_model=model)
    with pytest.raises(StartError) as caught:
        TritonServer(tmp_path).start()
    assert str(caught.value).startswith(f"broken: {reason}")
    assert len(str(caught.value).splitlines()) == 1


@pytest.fixture(scope="module")
def backend() -> Iterator[ModuleType]:
    """The backend's module, imported here as a stub imports it there."""
    pytriton = importlib.util.find_spec("pytriton")
    assert pytriton and pytriton.origin
    folders = [
        ROOT / "server/backends/onnxruntime",
        Path(pytriton.origin).parent / "tritonserver/backends/python",
    ]
    with pytest.MonkeyPatch.context() as patch:
        for folder in folders:
            patch.syspath_prepend(folder)
        yield importlib.import_module("model")
        del sys.modules["model"]


def session(model: Any) -> ort.InferenceSession:
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def parsed(inputs: tiny.Tensors, outputs: tiny.Tensors, batch: int = 8) -> dict[str, Any]:
    """A config as Triton passes it to a backend."""
    kinds = {"input": inputs, "output": outputs}
    tensors = {
        kind: [{"name": name, "data_type": spec[0], "dims": spec[1]} for name, spec in one.items()]
        for kind, one in kinds.items()
    }
    return {"max_batch_size": batch, **tensors}


FP32 = "TYPE_FP32"


@pytest.mark.parametrize(
    ("config", "batch", "difference"),
    [
        (parsed(tiny.X, tiny.Y), ("b",), None),
        (parsed(tiny.X, {}), ("b",), None),
        (parsed({"x": (FP32, [2, 3])}, {"y": (FP32, [2, 3])}, batch=0), ("a",), None),
        (
            parsed(tiny.X, tiny.Y),
            (1,),
            "input x: .* \\[-1, 3\\] in config.*\\[1, 3\\] in the graph",
        ),
        (parsed(tiny.X, tiny.Y, batch=0), ("b",), r"\[3\] in config.*\[-1, 3\] in the graph"),
        (
            parsed({"x": (FP32, [-1])}, tiny.Y),
            ("b",),
            r"input x: .*\[-1, -1\] in config.*\[-1, 3\]",
        ),
        (parsed(tiny.X, {"y": (FP32, [4])}), ("b",), r"output y: .*\[-1, 4\] in config.*\[-1, 3\]"),
        (parsed({**tiny.X, "u": (FP32, [1])}, tiny.Y), ("b",), "input u: not in the graph"),
        (parsed({}, tiny.Y), ("b",), "input x: not in config.pbtxt"),
        (parsed({"x": ("TYPE_BF16", [3])}, tiny.Y), ("b",), "TYPE_BF16 is not supported"),
    ],
)
def test_signatures(
    backend: ModuleType, config: dict[str, Any], batch: Sequence[Any], difference: str | None
) -> None:
    opened = session(tiny.plus_one(batch=batch))
    if difference is None:
        backend.check_signature(opened, config)
    else:
        with pytest.raises(ValueError, match=difference):
            backend.check_signature(opened, config)


def test_a_reshaped_tensor_is_compared_as_the_graph_sees_it(backend: ModuleType) -> None:
    config = parsed({"x": (FP32, [1, 3])}, tiny.Y)
    config["input"][0]["reshape"] = {"shape": [3]}
    backend.check_signature(session(tiny.plus_one()), config)


@pytest.mark.parametrize(
    ("level", "expected"),
    [(None, "ENABLE_ALL"), (-1, "ENABLE_BASIC"), (1, "ENABLE_EXTENDED"), (2, "DISABLE_ALL")],
)
def test_graph_levels(backend: ModuleType, level: int | None, expected: str) -> None:
    config = {} if level is None else {"optimization": {"graph": {"level": level}}}
    options = backend.session_options(config)
    assert options.graph_optimization_level.name == f"ORT_{expected}"


def test_parameters(backend: ModuleType) -> None:
    values = {
        "intra_op_thread_count": 3,
        "inter_op_thread_count": 2,
        "execution_mode": 1,
        "enable_mem_arena": 0,
        "enable_mem_pattern": 0,
    }
    parameters = {key: {"string_value": str(value)} for key, value in values.items()}
    options = backend.session_options({"parameters": parameters})
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 2)
    assert options.execution_mode == ort.ExecutionMode.ORT_PARALLEL
    assert not options.enable_cpu_mem_arena
    assert not options.enable_mem_pattern


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("intra_op_thread_count", "two", "intra_op_thread_count must be an integer, not 'two'"),
        ("execution_mode", "7", r"execution_mode must be one of \[0, 1\], not 7"),
        ("enable_mem_arena", "-1", r"enable_mem_arena must be one of \[0, 1\], not -1"),
    ],
)
def test_bad_parameters(backend: ModuleType, key: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        backend.session_options({"parameters": {key: {"string_value": value}}})


def test_a_gpu_instance_uses_cuda_where_there_is_one(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    logger = SimpleNamespace(log_warn=warnings.append)  # only the stub has the real one
    monkeypatch.setattr(backend.pb_utils, "Logger", logger, raising=False)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert backend.choose_providers("GPU", "1", {}) == ["CPUExecutionProvider"]
    assert warnings == ["this onnxruntime was built without cuda"]

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    cuda, cpu = backend.choose_providers("GPU", "1", {})
    assert cuda == ("CUDAExecutionProvider", {"device_id": "1"})
    assert backend.choose_providers("CPU", "0", {}) == [cpu]

    both = ["CUDAExecutionProvider", "TensorrtExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: both)
    requested = {"tensorrt": {"trt_engine_cache_enable": "1"}}
    tensorrt = ("TensorrtExecutionProvider", {"device_id": "1", "trt_engine_cache_enable": "True"})
    assert backend.choose_providers("GPU", "1", requested) == [tensorrt, cuda, cpu]


def test_a_provider_that_cannot_be_loaded_ends_the_start(backend: ModuleType) -> None:
    """Instead of silently continuing on the CPU."""
    cuda, cpu = "CUDAExecutionProvider", "CPUExecutionProvider"
    backend.check_providers([cpu], [cpu])
    backend.check_providers([(cuda, {"device_id": "0"}), cpu], [cuda, cpu])
    with pytest.raises(ValueError, match=f"could not load {cuda}: CUDA's libraries are missing"):
        backend.check_providers([(cuda, {"device_id": "0"}), cpu], [cpu])


def test_accelerators_are_read_as_triton_writes_them(backend: ModuleType) -> None:
    def config(name: str) -> dict[str, Any]:
        chosen = {"gpu_execution_accelerator": [{"name": name, "parameters": {"key": "value"}}]}
        return {"optimization": {"execution_accelerators": chosen}}

    assert backend.accelerators({}) == {}
    assert backend.accelerators(config("tensorrt")) == {"tensorrt": {"key": "value"}}
    with pytest.raises(ValueError, match="must be one of"):
        backend.accelerators(config("openvino"))


def test_outputs_of_another_batch_size_are_rejected(backend: ModuleType) -> None:
    with pytest.raises(ValueError, match="differ in batch size"):
        backend.split({"y": np.zeros((1, 3))}, [1, 2])


def test_threads_do_not_spin_on_the_next_models_cores(backend: ModuleType) -> None:
    options = backend.session_options({})
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_inputs_that_the_graph_rejects_are_an_invalid_request(
    client: InferenceServerClient,
) -> None:
    index = np.array([[1], [7], [2], [0]], np.int32)  # as many as are merged: nothing is waited for
    with pytest.raises(InferenceServerException, match="out of data bounds") as caught:
        client.infer("table", [tensor("index", index)])
    assert caught.value.status() == "400"
