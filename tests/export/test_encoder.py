"""The encoder's graph: Meta's numbers computed differently, and a self-describing ONNX file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor, nn

from export import checkpoint
from export.architecture import InteractiveModel
from export.check import encode_reference, relative_error
from export.encoder import (
    FEATURES,
    MAX_BATCH,
    OPSET,
    ImageEncoder,
    _then_pointwise,
    _Windows,
    export_encoder,
)
from export.repository import ENCODER
from tests.export import tiny

FITS, TOO_LARGE, DOES_NOT_DIVIDE = 112, 28, 154
"""Image sizes whose grids (8, 2 and 11 patches) fit windows of 4 in different ways."""


def _images(count: int, side: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(count)
    return rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def _reference(model: InteractiveModel, images: NDArray[np.uint8]) -> tuple[Tensor, ...]:
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        return model.encode((pixels - 0.5) / 0.5)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("side", [FITS, TOO_LARGE, DOES_NOT_DIVIDE])
def test_the_embeddings_are_the_same_as_metas(tiny_checkpoint: Path, side: int, count: int) -> None:
    model = checkpoint.load(tiny_checkpoint, image_size=side)
    images = _images(count, side)
    ours = ImageEncoder(model)(torch.from_numpy(images))
    for a, b in zip(ours, _reference(model, images), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_an_image_does_not_depend_on_its_batch(model: InteractiveModel) -> None:
    encoder, images = ImageEncoder(model), torch.from_numpy(_images(3, FITS))
    together = encoder(images)
    for i in range(3):
        for whole, alone in zip(together, encoder(images[i : i + 1]), strict=True):
            torch.testing.assert_close(whole[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_a_half_precision_trunk_may_be_global_throughout() -> None:
    architecture = replace(tiny.ARCHITECTURE, global_att_blocks=(0, 1))
    model = InteractiveModel(architecture).eval()
    image = _images(1, FITS)
    half = ImageEncoder(model, torch.float16)(torch.from_numpy(image))
    for ours, theirs in zip(half, encode_reference(model, image[0]), strict=True):
        assert relative_error(ours, theirs) < 0.01


@pytest.mark.parametrize("side", [FITS, TOO_LARGE, DOES_NOT_DIVIDE])
def test_window_order_is_a_permutation(side: int) -> None:
    architecture = tiny.resized(side)
    windows, e = _Windows(architecture), architecture.grid
    grid = torch.arange(2 * e * e * 3).reshape(2, e, e, 3)
    parts = windows.split(grid)
    assert torch.equal(windows.merge(parts), grid.permute(0, 3, 1, 2))
    assert torch.equal(windows.part(windows.join(parts)), parts)
    if windows.fits:
        assert torch.equal(parts[0], grid[0, :4, :4])


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_pointwise_convolution_is_folded_away(
    kind: type[nn.Conv2d] | type[nn.ConvTranspose2d],
) -> None:
    torch.manual_seed(0)
    first = kind(6, 5, kernel_size=2, stride=2) if kind is nn.ConvTranspose2d else kind(6, 5, 3)
    pointwise = nn.Conv2d(5, 7, 1)
    before = [p.clone() for p in first.parameters()]
    x = torch.randn(2, 6, 8, 8)
    folded = _then_pointwise(first, pointwise)
    torch.testing.assert_close(folded(x), pointwise(first(x)), rtol=1e-4, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, first.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_model_is_not_modified(tiny_checkpoint: Path, dtype: torch.dtype) -> None:
    model, untouched = checkpoint.load(tiny_checkpoint), checkpoint.load(tiny_checkpoint)
    ImageEncoder(model, dtype)(torch.from_numpy(_images(1, FITS)))
    for (name, ours), theirs in zip(model.named_parameters(), untouched.parameters(), strict=True):
        assert ours.dtype == torch.float32, name
        assert torch.equal(ours, theirs), name


def test_the_trunks_weights_are_not_copied(model: InteractiveModel) -> None:
    """At full size they are 1.8 GB."""
    theirs = {p.data_ptr() for p in model.trunk.blocks.parameters()}
    assert {p.data_ptr() for p in ImageEncoder(model).blocks.parameters()} == theirs


@pytest.fixture(scope="module")
def session(exported: tiny.Export) -> ort.InferenceSession:
    return ort.InferenceSession(exported.repository / ENCODER / "1" / "model.onnx")


def _graph(export: tiny.Export) -> onnx.ModelProto:
    path = export.repository / ENCODER / "1" / "model.onnx"
    return onnx.shape_inference.infer_shapes(onnx.load(path))


@pytest.mark.parametrize("count", [1, 3, MAX_BATCH])
def test_the_graph_accepts_any_batch_size(
    session: ort.InferenceSession, model: InteractiveModel, count: int
) -> None:
    images = _images(count, FITS)
    outputs = session.run(list(FEATURES), {"image": images})
    for a, b in zip(outputs, _reference(model, images), strict=True):
        torch.testing.assert_close(torch.from_numpy(a), b, rtol=1e-3, atol=1e-4)


def test_the_graphs_signature(exported: tiny.Export, exported_fp16: tiny.Export) -> None:
    for export, kind in ((exported, TensorProto.FLOAT), (exported_fp16, TensorProto.FLOAT16)):
        graph = _graph(export).graph
        assert _signature(graph.input) == {"image": (TensorProto.UINT8, [112, 112, 3])}
        assert _signature(graph.output) == {
            "image_embed": (kind, [64, 8, 8]),
            "high_res_feats_0": (kind, [8, 32, 32]),
            "high_res_feats_1": (kind, [16, 16, 16]),
        }


def _signature(values: Sequence[onnx.ValueInfoProto]) -> dict[str, tuple[int, list[int]]]:
    """Type and dims of each; the first axis must be the only dynamic one, the batch."""
    batches = {value.type.tensor_type.shape.dim[0].dim_param for value in values}
    assert len(batches) == 1
    assert batches != {""}
    return {
        value.name: (
            value.type.tensor_type.elem_type,
            [dim.dim_value for dim in value.type.tensor_type.shape.dim[1:]],
        )
        for value in values
    }


def test_the_graphs_operators(exported: tiny.Export, exported_fp16: tiny.Export) -> None:
    """ONNX Runtime's own fused ones, not opset 23's Attention, which runs on the CPU."""
    for export in (exported, exported_fp16):
        proto = _graph(export)
        opsets = {entry.domain: entry.version for entry in proto.opset_import}
        assert opsets[""] == OPSET
        assert opsets.keys() <= {"", "com.microsoft"}
        kinds = Counter((node.domain, node.op_type) for node in proto.graph.node)
        depth = tiny.ARCHITECTURE.depth
        assert kinds["com.microsoft", "MultiHeadAttention"] == depth
        assert kinds["com.microsoft", "RotaryEmbedding"] == 2 * depth
        skips = 2 * depth - 1 if export is exported_fp16 else 0
        assert kinds["com.microsoft", "SkipLayerNormalization"] == skips
        assert not {("", "Attention"), ("", "Softmax")} & kinds.keys()
        assert not proto.functions


def _takers_of_the_image(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node if "image" in node.input]


def test_the_image_is_input_to_a_cast_only(
    exported: tiny.Export, exported_fp16: tiny.Export
) -> None:
    """As TensorRT requires for UINT8; the next test checks the graph made for TensorRT."""
    for export in (exported, exported_fp16):
        assert _takers_of_the_image(_graph(export)) == ["Cast"]


def test_a_graph_of_plain_operators_computes_the_same(
    model: InteractiveModel, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    export_encoder(ImageEncoder(model, fused=False), FITS, path)
    proto = onnx.load(path)
    assert {entry.domain for entry in proto.opset_import} == {""}
    assert _takers_of_the_image(proto) == ["Cast"]
    kinds = Counter(node.op_type for node in proto.graph.node)
    assert kinds["Softmax"] == tiny.ARCHITECTURE.depth
    images = _images(3, FITS)
    outputs = ort.InferenceSession(path).run(list(FEATURES), {"image": images})
    for a, b in zip(outputs, _reference(model, images), strict=True):
        torch.testing.assert_close(torch.from_numpy(a), b, rtol=1e-3, atol=1e-4)


def test_weights_are_stored_beside_the_graph(exported: tiny.Export) -> None:
    folder = exported.repository / ENCODER / "1"
    small, data = (folder / "model.onnx").stat().st_size, (folder / "model.onnx.data")
    assert data.stat().st_size > small


def test_what_stays_in_fp32_in_a_half_precision_graph(
    model: InteractiveModel, tmp_path: Path
) -> None:
    """With plain operators: layer norms, the residual stream and the patch projection only."""
    path = tmp_path / "model.onnx"
    export_encoder(ImageEncoder(model, torch.float16, fused=False), FITS, path)
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    types |= {weight.name: weight.data_type for weight in graph.initializer}
    norms = [node for node in graph.node if node.op_type == "LayerNormalization"]
    assert len(norms) == 1 + 2 * tiny.ARCHITECTURE.depth
    for node in norms:
        assert {types[name] for name in node.input} == {TensorProto.FLOAT}
    stream = {norm.input[0] for norm in norms}
    for node in reversed(graph.node):  # tokens change their layout, not their type
        if node.op_type == "Reshape" and node.output[0] in stream:
            stream.add(node.input[0])
    residuals = [n for n in graph.node if n.op_type == "Add" and n.output[0] in stream]
    # The positions, and two for each block; the last of them goes to the neck.
    assert len(residuals) == 2 * tiny.ARCHITECTURE.depth
    for node in residuals:
        assert {types[name] for name in node.input} == {TensorProto.FLOAT}
    products = [n for n in graph.node if n.op_type in ("MatMul", "Gemm", "Conv", "ConvTranspose")]
    kinds = [{types[name] for name in node.input} for node in products]
    assert kinds[0] == {TensorProto.FLOAT}
    # Four for each block and two in its attention, and the neck's seven.
    assert kinds[1:] == [{TensorProto.FLOAT16}] * (6 * tiny.ARCHITECTURE.depth + 7)
