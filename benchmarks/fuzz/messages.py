"""Requests that need not make sense, and their bytes on either protocol."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

INFERENCE_HEADER = "Inference-Header-Content-Length"
INT64 = 2**63 - 1
CONTENTS = {"BOOL": "bool_contents", "INT32": "int_contents", "FP32": "fp32_contents"}


@dataclass(frozen=True)
class Tensor:
    """An input as claimed: the data need not match the shape and type."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes = b""
    values: Any = None
    """Values to send as JSON, or as gRPC's typed contents, instead of `data`."""
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_array(cls, name: str, array: NDArray[Any]) -> Tensor:
        """Describe an array truthfully."""
        strings = array.dtype == np.object_
        data = serialize_byte_tensor(array).item() if strings else array.tobytes()
        return cls(name, np_to_triton_dtype(array.dtype), tuple(array.shape), data)


@dataclass(frozen=True)
class Request:
    """One inference request."""

    model: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Mapping[str, Any], ...] = ()
    """Each {"name": …, "parameters": …}; empty asks for all."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""

    def input(self, name: str) -> Tensor | None:
        return next((tensor for tensor in self.inputs if tensor.name == name), None)

    def replacing(self, *tensors: Tensor) -> Request:
        """Replace the inputs of the same names, or add new ones."""
        new = {tensor.name: tensor for tensor in tensors}
        kept = tuple(new.pop(tensor.name, tensor) for tensor in self.inputs)
        return replace(self, inputs=(*kept, *new.values()))

    def without(self, name: str) -> Request:
        return replace(self, inputs=tuple(t for t in self.inputs if t.name != name))


def http_path(request: Request) -> str:
    version = f"/versions/{quote(request.version, safe='')}" if request.version else ""
    return f"/v2/models/{quote(request.model, safe='')}{version}/infer"


def http_body(request: Request) -> tuple[bytes, bytes]:
    """JSON header and binary data, as in the HTTP protocol's binary tensor data extension."""
    header: dict[str, Any] = {
        "inputs": [_http_input(tensor) for tensor in request.inputs],
        "parameters": {"binary_data_output": True, **request.parameters},
    }
    if request.outputs:
        header["outputs"] = list(request.outputs)
    data = b"".join(tensor.data for tensor in request.inputs if tensor.values is None)
    return json.dumps(header).encode(), data


def _http_input(tensor: Tensor) -> dict[str, Any]:
    said = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
    if tensor.values is not None:
        return {**said, "data": tensor.values, "parameters": dict(tensor.parameters)}
    return {**said, "parameters": {"binary_data_size": len(tensor.data), **tensor.parameters}}


def http_message(
    path: str, body: bytes, headers: Mapping[str, str | int], method: str = "POST"
) -> bytes:
    """The octets of one HTTP/1.1 request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: triton"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + body


def http_octets(request: Request) -> bytes:
    """The whole HTTP request."""
    header, data = http_body(request)
    lengths = {"Content-Length": len(header) + len(data), INFERENCE_HEADER: len(header)}
    return http_message(http_path(request), header + data, lengths)


def grpc_octets(request: Request) -> bytes:
    """The gRPC message, ModelInferRequest."""
    message = service_pb2.ModelInferRequest(model_name=request.model, model_version=request.version)
    # Triton accepts either all inputs as raw data or all as typed contents.
    typed = any(tensor.values is not None for tensor in request.inputs)
    for tensor in request.inputs:
        _add_input(message, tensor, typed)
    for output in request.outputs:
        added = message.outputs.add(name=output["name"])
        _set_parameters(added.parameters, output.get("parameters", {}))
    _set_parameters(message.parameters, request.parameters)
    return bytes(message.SerializeToString())


def _add_input(message: Any, tensor: Tensor, typed: bool) -> None:
    shape = [max(-INT64, min(INT64, size)) for size in tensor.shape]
    added = message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=shape)
    _set_parameters(added.parameters, tensor.parameters)
    if not typed:
        message.raw_input_contents.append(tensor.data)
        return
    values = _spelled(tensor) if tensor.values is None else tensor.values
    try:
        getattr(added.contents, CONTENTS.get(tensor.datatype, "bytes_contents")).extend(values)
    except (TypeError, ValueError):  # protobuf cannot represent it: send no contents at all
        added.contents.Clear()


def _spelled(tensor: Tensor) -> list[Any]:
    """The values of a tensor's data; the octets for FP16, which gRPC's contents lack."""
    kinds = {"FP32": np.float32, "INT32": np.int32, "BOOL": np.bool_}
    if tensor.datatype in kinds:
        whole = len(tensor.data) // 4 * 4 if tensor.datatype != "BOOL" else len(tensor.data)
        return list(np.frombuffer(tensor.data[:whole], kinds[tensor.datatype]).tolist())
    strings, data = [], tensor.data
    while len(data) >= 4 and tensor.datatype == "BYTES":
        end = 4 + int.from_bytes(data[:4], "little")
        strings.append(data[4:end])
        data = data[end:]
    return strings or [tensor.data]


def _set_parameters(target: Any, parameters: Mapping[str, Any]) -> None:
    for name, value in parameters.items():
        if isinstance(value, bool):
            target[name].bool_param = value
        elif isinstance(value, int):
            target[name].int64_param = max(-INT64, min(INT64, value))
        elif isinstance(value, float):
            target[name].double_param = value
        else:
            target[name].string_param = str(value)
