"""The blocks in half precision give FP32's numbers, however large the residual stream gets."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from export import checkpoint
from export.architecture import InteractiveModel
from export.encoder import FEATURES, ImageEncoder, export_encoder
from export.half_precision import ROTATED_AT_ONCE, STREAM_SCALE, HalfPrecisionBlocks
from tests.export import tiny
from tests.export.test_encoder import DOES_NOT_DIVIDE, FITS, _images, _reference

ROUNDING = 5e-3
"""Relative error (L2); FP16 rounds by 5e-4."""
LARGEST = torch.finfo(torch.float16).max


def _error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs).norm() / theirs.norm())


@pytest.fixture(scope="module")
def path(model: InteractiveModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("half") / "model.onnx"
    export_encoder(ImageEncoder(model, torch.float16), FITS, path)
    return path


@pytest.mark.parametrize("count", [1, 3])
def test_the_embeddings_differ_from_fp32_only_by_rounding(
    model: InteractiveModel, path: Path, count: int
) -> None:
    images = _images(count, FITS)
    eager = ImageEncoder(model, torch.float16)(torch.from_numpy(images))
    served = ort.InferenceSession(path).run(list(FEATURES), {"image": images})
    for ours, graphs, theirs in zip(eager, served, _reference(model, images), strict=True):
        assert ours.dtype == torch.float16
        assert _error(ours, theirs) < ROUNDING
        assert _error(torch.from_numpy(graphs), theirs) < ROUNDING


@pytest.mark.parametrize("fused", [True, False])
def test_a_stream_beyond_half_precision_does_not_overflow(
    model: InteractiveModel, fused: bool
) -> None:
    half, single = ImageEncoder(model, torch.float16, fused=fused), ImageEncoder(model)
    grid, channels = tiny.ARCHITECTURE.grid, tiny.ARCHITECTURE.embed_dim
    tokens = torch.randn(2, grid, grid, channels, generator=torch.manual_seed(0)) * LARGEST
    tokens = half.windows.split(tokens)
    theirs = single.blocks(tokens)
    assert theirs.abs().max() > 2 * LARGEST
    ours = half.blocks(tokens).float() * STREAM_SCALE
    assert _error(ours.reshape(theirs.shape), theirs) < ROUNDING


@pytest.mark.parametrize(("side", "fused"), [(FITS, True), (FITS, False), (DOES_NOT_DIVIDE, True)])
def test_blocks_may_add_up_to_more_than_half_precision_holds(
    tiny_checkpoint: Path, side: int, fused: bool
) -> None:
    """As vision transformers do, in a channel or two."""
    model = checkpoint.load(tiny_checkpoint, image_size=side)
    for block in model.trunk.blocks:
        block.mlp.fc2.bias[3] = 0.9 * LARGEST
    images = _images(1, side)
    ours = ImageEncoder(model, torch.float16, fused=fused)(torch.from_numpy(images))
    for mine, theirs in zip(ours, _reference(model, images), strict=True):
        assert _error(mine, theirs) < ROUNDING


def test_nothing_is_cast_between_blocks_and_tables_are_stored_once(path: Path) -> None:
    graph = onnx.load(path).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["Cast"] == 2  # pixels to FP32, the stream to FP16
    assert kinds["Split"] == 0
    assert kinds["SkipLayerNormalization"] == 2 * tiny.ARCHITECTURE.depth - 1
    tables = [t for t in graph.initializer if t.name.endswith(("_cos", "_sin"))]
    rotations = [node for node in graph.node if node.op_type == "RotaryEmbedding"]
    assert {name for node in rotations for name in node.input[2:]} == {t.name for t in tables}
    assert len(tables) == 2 * 2  # for windowed and for global attention


@pytest.mark.parametrize(("heads", "width", "together"), [(16, 64, 4), (4, 12, 4), (10, 64, 2)])
def test_the_most_heads_that_fit_are_rotated_at_once(heads: int, width: int, together: int) -> None:
    """SAM 3's, the tiny model's, and more than fit: the largest divisor that does."""
    architecture = replace(tiny.ARCHITECTURE, embed_dim=heads * width, num_heads=heads)
    encoder = ImageEncoder(InteractiveModel(architecture), torch.float16)
    assert isinstance(encoder.blocks, HalfPrecisionBlocks)
    assert encoder.blocks._blocks[0].attn.heads_at_once == together
    assert together * width <= ROTATED_AT_ONCE


def test_the_stream_stays_fp32_if_windows_do_not_fit(tiny_checkpoint: Path) -> None:
    """Meta's blocks cut and pad the grid themselves there."""
    model = checkpoint.load(tiny_checkpoint, image_size=DOES_NOT_DIVIDE)
    encoder = ImageEncoder(model, torch.float16)
    assert not isinstance(encoder.blocks, HalfPrecisionBlocks)
    images = _images(1, DOES_NOT_DIVIDE)
    ours = encoder(torch.from_numpy(images))
    for mine, theirs in zip(ours, _reference(model, images), strict=True):
        assert _error(mine, theirs) < ROUNDING
        assert np.isfinite(mine.float().numpy()).all()
