"""The range of values in a half-precision graph, observed in the FP32 reference run.

ONNX Runtime computes most of an FP16 graph in FP32 on a CPU: values that overflow on a GPU do not
show in its output there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from export.architecture import InteractiveModel
from export.encoder import keeps_fp16_stream
from export.half_precision import STREAM_SCALE

LARGEST_ACCEPTED = 2.0**15
"""Half of what FP16 holds, because other photos have other values."""


@contextmanager
def record_largest(layers: Iterable[tuple[nn.Module, int]]) -> Iterator[list[float]]:
    """Append each layer's largest value, divided by its scale, to the list when the model runs.

    layers: each with its scale.
    """
    largest: list[float] = []

    def record(scale: int, _: nn.Module, __: object, output: Tensor) -> None:
        largest.append(float(output.abs().max()) / scale)

    hooks = [layer.register_forward_hook(partial(record, scale)) for layer, scale in layers]
    try:
        yield largest
    finally:
        for hook in hooks:
            hook.remove()


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
