"""The values that an FP16 graph has to hold are those that its layers put out in FP32."""

from __future__ import annotations

import torch
from torch import nn

from export.architecture import InteractiveModel
from export.half_precision import STREAM_SCALE
from export.half_range import narrowed, noting_largest


def test_the_largest_is_noted_divided_and_only_inside() -> None:
    layer = nn.Identity()
    with noting_largest([(layer, 1), (layer, 16)]) as found:
        layer(torch.tensor([1.0, -64.0]))
    layer(torch.tensor([128.0]))
    assert found == [64, 4]


def test_the_stream_and_what_is_added_to_it_are_kept_divided(model: InteractiveModel) -> None:
    divided = {layer for layer, by in narrowed(model) if by == STREAM_SCALE}
    blocks = model.trunk.blocks
    added = {layer for block in blocks for layer in (block.attn.proj, block.mlp.fc2)}
    assert divided == {*blocks, *added}
