"""Checks names, types and shapes of graphs and configs, and both ends of every ensemble wire."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx
from torch import Tensor
from torch.export import ExportedProgram
from tritonclient.grpc import model_config_pb2

from export.encoder import FEATURES
from export.repository import DECODER, ENCODER, ENSEMBLES, read_config

Signature = dict[str, tuple[str, tuple[int, ...]]]

DECODER_OUTPUTS = ("low_res_masks", "iou_predictions")
INTERNAL = {"mask_index"}
"""Inputs of the decoder's program that are not tensors of a request."""


class SignatureError(Exception):
    """A graph and its config, or the two ends of an ensemble's wire, disagree."""


def check_signatures(repository: Path, program: ExportedProgram) -> None:
    """Compare names, types and shapes of encoder, decoder, configs and wires.

    Raises `SignatureError`.
    """
    encoder = read_config(repository, ENCODER)
    graph = onnx.load(repository / ENCODER / "1" / "model.onnx", load_external_data=False).graph
    _same("the encoder's inputs", _graph_signature(graph.input), _signature(encoder.input))
    _same("the encoder's outputs", _graph_signature(graph.output), _signature(encoder.output))
    _check_program(program, read_config(repository, DECODER))
    for ensemble in ENSEMBLES:
        _check_wires(repository, read_config(repository, ensemble))


def _check_program(program: ExportedProgram, decoder: model_config_pb2.ModelConfig) -> None:
    """Check shapes only: the program's caller converts to its FP32."""
    inputs, outputs = _signature(decoder.input), _signature(decoder.output)
    shapes = {node.name: _static(node.meta.get("val")) for node in program.graph.nodes}
    for name in program.graph_signature.user_inputs:
        # An embedding has one more axis than in the config, whose dims are those of one image.
        dims = shapes[name][1:] if name in FEATURES else shapes[name]
        if name not in INTERNAL and inputs.get(name, ("", None))[1] != dims:
            raise SignatureError(f"the decoder's {name} is {dims}, but its config has {inputs}")
    for name, node in zip(DECODER_OUTPUTS, program.graph_signature.user_outputs, strict=True):
        _, dims = outputs[name]
        if not all(c in (-1, d) for c, d in zip(dims, shapes[node], strict=True)):
            raise SignatureError(
                f"the decoder's {name} is {shapes[node]}, but its config has {dims}"
            )


def _static(value: object) -> tuple[int, ...]:
    shape = value.shape if isinstance(value, Tensor) else ()
    return tuple(size if isinstance(size, int) else -1 for size in shape)


def _check_wires(repository: Path, ensemble: model_config_pb2.ModelConfig) -> None:
    wires = _signature(ensemble.input)
    results = _signature(ensemble.output)
    for step in ensemble.ensemble_scheduling.step:
        model = read_config(repository, step.model_name)
        inputs, outputs = _signature(model.input), _signature(model.output)
        for name, wire in step.input_map.items():
            if wire not in wires:
                raise SignatureError(
                    f"{ensemble.name}: no step outputs {wire} for {step.model_name}.{name}"
                )
            ends = {name: wires[wire]}, {name: inputs.get(name)}
            _same(f"{ensemble.name}: the ends of {wire} into {step.model_name}", *ends)
        for name, wire in step.output_map.items():
            if name not in outputs:
                raise SignatureError(f"{step.model_name} has no output {name}")
            wires[wire] = outputs[name]
    for name, tensor in results.items():
        _same(f"{ensemble.name}'s outputs", {name: tensor}, {name: wires.get(name)})


def _same(what: str, ours: Mapping[str, object], theirs: Mapping[str, object]) -> None:
    if ours != theirs:
        raise SignatureError(f"{what} disagree:\n  {ours}\n  {theirs}")


def _signature(tensors: Iterable[model_config_pb2.ModelInput]) -> Signature:
    return {
        tensor.name: (
            model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_"),
            tuple(tensor.dims),
        )
        for tensor in tensors
    }


def _graph_signature(tensors: Iterable[onnx.ValueInfoProto]) -> Signature:
    spelling = {"FLOAT": "FP32", "FLOAT16": "FP16"}
    signature = {}
    for value in tensors:
        tensor = value.type.tensor_type
        name = onnx.TensorProto.DataType.Name(tensor.elem_type)
        dims = tuple(dim.dim_value for dim in tensor.shape.dim[1:])
        signature[value.name] = (spelling.get(name, name), dims)
    return signature
