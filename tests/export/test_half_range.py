"""The values that an FP16 graph must hold are the outputs of its layers in FP32."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from export import checkpoint
from export.encoder import ImageEncoder
from export.half_precision import STREAM_SCALE, HalfPrecisionBlocks
from export.half_range import fp16_attentions, fp16_layers, record_largest
from tests.export.test_encoder import DOES_NOT_DIVIDE, FITS


def test_the_largest_values_are_recorded_scaled_and_only_within_the_context() -> None:
    layer = nn.Identity()
    with record_largest([(layer, 1), (layer, 16)]) as found:
        layer(torch.tensor([1.0, -64.0]))
    layer(torch.tensor([128.0]))
    assert found == [64, 4]


def test_no_score_of_a_plain_attention_exceeds_what_is_recorded(tiny_checkpoint: Path) -> None:
    model = checkpoint.load(tiny_checkpoint)
    torch.manual_seed(0)
    images = torch.rand(1, 3, model.architecture.image_size, model.architecture.image_size)
    scores = []

    def largest_score(query: Tensor, key: Tensor, *_: object, **__: object) -> Tensor:
        scores.append(float((query @ key.mT).abs().max()) / math.sqrt(query.shape[-1]))
        return query

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", largest_score)
        with record_largest((), fp16_attentions(model, fused=False)) as bounds:
            model.trunk(images)
    assert len(bounds) == len(scores) == model.architecture.depth
    assert all(score <= bound < 4 * score for score, bound in zip(scores, bounds, strict=True))
    assert not list(fp16_attentions(model, fused=True))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("side", [FITS, DOES_NOT_DIVIDE])
def test_values_that_the_graph_keeps_scaled_are_recorded_scaled(
    tiny_checkpoint: Path, side: int, fused: bool
) -> None:
    """The stream, and what is added to it if that is FP16 too."""
    model = checkpoint.load(tiny_checkpoint, image_size=side)
    divided = {layer for layer, by in fp16_layers(model, fused=fused) if by == STREAM_SCALE}
    blocks = model.trunk.blocks
    added = {layer for block in blocks for layer in (block.attn.proj, block.mlp.fc2)}
    graph = ImageEncoder(model, torch.float16, fused=fused)
    halved = isinstance(graph.blocks, HalfPrecisionBlocks)
    assert divided == ({*blocks, *added} if halved else {*blocks})
    assert added <= {layer for layer, _ in fp16_layers(model, fused=fused)}
