"""The range of values in a half-precision graph, observed in the FP32 reference run.

ONNX Runtime computes most of an FP16 graph in FP32 on a CPU: values that overflow on a GPU do not
show in its output there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from sam3.model.vitdet import Attention
from torch import Tensor, nn

from export.architecture import InteractiveModel
from export.encoder import keeps_fp16_stream
from export.half_precision import STREAM_SCALE

LARGEST_ACCEPTED = 2.0**15
"""Half of what FP16 holds, because other photos have other values."""


@contextmanager
def record_largest(
    layers: Iterable[tuple[nn.Module, int]], attentions: Iterable[Attention] = ()
) -> Iterator[list[float]]:
    """Append largest values to the list when the model runs.

    layers: each with its scale, by which its largest value is divided.
    attentions: whose scores, q·k/√d, are values too; recorded is a bound on them.
    """
    largest: list[float] = []

    def record(scale: int, _: nn.Module, __: object, output: Tensor) -> None:
        largest.append(float(output.abs().max()) / scale)

    def record_scores(num_heads: int, _: nn.Module, __: object, output: Tensor) -> None:
        largest.append(_largest_score(output, num_heads))

    hooks = [layer.register_forward_hook(partial(record, scale)) for layer, scale in layers]
    hooks += [a.qkv.register_forward_hook(partial(record_scores, a.num_heads)) for a in attentions]
    try:
        yield largest
    finally:
        for hook in hooks:
            hook.remove()


def _largest_score(qkv: Tensor, num_heads: int) -> float:
    """A bound on |q·k|/√d over all tokens [..., 3C]: longest query times longest key of a head.

    Rotation, which follows, changes no length.
    """
    heads = qkv.reshape(-1, 3, num_heads, qkv.shape[-1] // (3 * num_heads))
    query, key, _ = heads.norm(dim=-1).amax(0)
    return float((query * key).max()) / math.sqrt(heads.shape[-1])


def fp16_attentions(model: InteractiveModel, *, fused: bool) -> Iterator[Attention]:
    """The attentions whose scores are FP16 in an FP16 graph: a fused operator's are FP32."""
    if not fused:
        yield from (block.attn for block in model.trunk.blocks)


def fp16_layers(model: InteractiveModel, *, fused: bool) -> Iterator[tuple[nn.Module, int]]:
    """The layers whose outputs are FP16 in an FP16 graph, and what they are divided by there."""
    added = STREAM_SCALE if keeps_fp16_stream(model.architecture, fused) else 1
    for block in model.trunk.blocks:
        yield from ((layer, 1) for layer in (block.attn.qkv, block.mlp.fc1))
        yield from ((layer, added) for layer in (block.attn.proj, block.mlp.fc2))
        yield block, STREAM_SCALE
    fine, middle, coarse = model.neck
    decoder = model.mask_decoder
    firsts = (fine.dconv_2x2_0, fine.conv_1x1, middle.conv_1x1, coarse.conv_1x1)
    yield from (
        (layer, 1) for layer in (*firsts, coarse.conv_3x3, decoder.conv_s0, decoder.conv_s1)
    )
