"""The trunk's blocks in half precision, with operators that ONNX Runtime has on CUDA.

    ┌─ residual stream ÷ 16, FP16 ─────────────────────────────┐
    │                                                          ▼
    └► norm ─► q, k, v ─► rotate q, k ─► attention ─► proj ─► + bias + stream, norm ─► MLP ─► …
                                                              └─ SkipLayerNormalization ─┘

After the matrix products, most of an FP32 stream's time goes into passes over it: cast, add the
bias, add the residual, normalise, cast back. In FP16 that is one operator.

The sums of a ViT this deep exceed half precision's range, so the stream is kept divided by
`STREAM_SCALE`. As a power of two it costs no precision, and norms cancel it, with their epsilon
scaled accordingly. Sums inside a norm and the softmax inside attention are FP32; the former since
ONNX Runtime 1.27 (Triton 26.07).
"""

from __future__ import annotations

from typing import cast

import torch
from sam3.model.vitdet import Attention, Block
from torch import Tensor, nn

from export.operators import attention, rotary_embedding, skip_layer_norm

STREAM_SCALE = 16
"""Allows stream values up to a million, 16 times what half precision holds."""

ROTATED_AT_ONCE = 256
"""Channels per head of the rotary operator; CUDA starts one block of threads for each head. With
SAM 3's 64 one call takes 52 µs (H200), much of it for starting 83,000 blocks. The encoder at batch
1 and 8 takes 16.5 and 121 ms with 64, 15.3 and 113 ms with 256, and no less with 512 or 1024."""


class HalfPrecisionBlocks(nn.Module):
    """All blocks; tokens are windows [B·n², w², C], or [B, n²·w², C] if attention is global."""

    def __init__(
        self,
        blocks: nn.ModuleList,
        global_att_blocks: frozenset[int],
        windowed_rotary: Tensor,
        global_rotary: Tensor,
    ) -> None:
        """windowed_rotary [w², D/2], global_rotary [n²·w², D/2]: complex, in the tokens' order."""
        super().__init__()
        self.global_att_blocks = global_att_blocks
        self._blocks = [_HalfBlock(cast(Block, block)) for block in blocks]
        self.blocks = nn.ModuleList(self._blocks)
        repeat = self._blocks[0].attn.heads_at_once
        self.windowed_cos, self.windowed_sin = _tables(windowed_rotary, repeat)
        self.global_cos, self.global_sin = _tables(global_rotary, repeat)

    def forward(self, tokens: Tensor) -> Tensor:
        """The stream before the first block, FP32 → after the last, FP16 ÷ `STREAM_SCALE`."""
        stream = (tokens / STREAM_SCALE).to(torch.float16)
        shape, channels = stream.shape, stream.shape[-1]
        normed: Tensor = self._blocks[0].norm1(stream)
        for i, block in enumerate(self._blocks):
            cos, sin = self._rotary(i)
            rows = (-1, len(cos), channels)
            made, stream = block(normed.reshape(rows), stream.reshape(rows), cos, sin)
            if i + 1 < len(self._blocks):
                following = self._blocks[i + 1].norm1
                normed, stream = skip_layer_norm(made, stream, following, block.bias)
        last: Tensor = stream + (made + block.bias)
        return last.reshape(shape)

    def _rotary(self, block: int) -> tuple[Tensor, Tensor]:
        if block in self.global_att_blocks:
            return self.global_cos, self.global_sin
        return self.windowed_cos, self.windowed_sin


class _HalfBlock(nn.Module):
    """Meta's block without the sum at its end, which is fused into the next block's norm."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.norm1, self.norm2 = _scaled_norm(block.norm1), _scaled_norm(block.norm2)
        self.attn = _HalfAttention(block.attn)
        self.fc1, self.act = _half(block.mlp.fc1.weight, block.mlp.fc1.bias), block.mlp.act
        self.fc2 = _half(block.mlp.fc2.weight / STREAM_SCALE)
        self.bias = _parameter(block.mlp.fc2.bias / STREAM_SCALE)

    def forward(
        self, normed: Tensor, stream: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the MLP adds to the stream, except `bias`, and the stream to add it to."""
        attended = self.attn(normed, cos, sin)
        normed, stream = skip_layer_norm(attended, stream, self.norm2, self.attn.bias)
        return self.fc2(self.act(self.fc1(normed))), stream


class _HalfAttention(nn.Module):
    """Meta's ViT attention; three products save the operator that would split one into three.

    Attention weights sum to 1, so the values' bias passes through unchanged and is folded into the
    projection's bias.
    """

    def __init__(self, meta: Attention) -> None:
        super().__init__()
        self.num_heads: int = meta.num_heads
        query, key, value = meta.qkv.weight.detach().chunk(3)
        query_bias, key_bias, value_bias = meta.qkv.bias.detach().chunk(3)
        self.query, self.key = _half(query, query_bias), _half(key, key_bias)
        self.value = _half(value)
        weight, bias = meta.proj.weight.detach(), meta.proj.bias.detach()
        self.proj = _half(weight / STREAM_SCALE)
        self.bias = _parameter((bias + weight @ value_bias) / STREAM_SCALE)

    @property
    def heads_at_once(self) -> int:
        """Heads that the rotary operator treats as one: the largest divisor that fits."""
        width = self.query.out_features // self.num_heads
        divisors = (n for n in range(self.num_heads, 0, -1) if self.num_heads % n == 0)
        return next((n for n in divisors if n * width <= ROTATED_AT_ONCE), 1)

    def forward(self, normed: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, L, C] → [B, L, C], without `bias`."""
        wide_heads = self.num_heads // self.heads_at_once
        query = rotary_embedding(self.query(normed), cos, sin, wide_heads)
        key = rotary_embedding(self.key(normed), cos, sin, wide_heads)
        projected: Tensor = self.proj(attention(query, key, self.value(normed), self.num_heads))
        return projected


def _tables(rotary: Tensor, repeat: int) -> tuple[nn.Buffer, nn.Buffer]:
    """cos and sin for `repeat` heads that are treated as one."""
    parts = (rotary.real, rotary.imag)
    cos, sin = (nn.Buffer(part.to(torch.float16).repeat(1, repeat).contiguous()) for part in parts)
    return cos, sin


def _scaled_norm(norm: nn.LayerNorm) -> nn.LayerNorm:
    """The same norm for input divided by `STREAM_SCALE`."""
    scaled = nn.LayerNorm(norm.normalized_shape, eps=norm.eps / STREAM_SCALE**2)
    scaled.load_state_dict(norm.state_dict())
    return scaled.to(torch.float16)


def _half(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = _parameter(weight)
    if bias is not None:
        linear.bias = _parameter(bias)
    return linear


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().to(torch.float16), requires_grad=False)
