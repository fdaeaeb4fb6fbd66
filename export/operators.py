"""Three operators that PyTorch runs as written here and ONNX Runtime runs fused.

PyTorch's exporter would decompose rotary embedding and attention into dozens of nodes and keep
whole attention matrices; as `com.microsoft` operators each is one kernel, on the CPU and on CUDA,
and the graph does not depend on the opset-23 `Attention` operator. `fused=False` exports them
decomposed, for runtimes that support neither.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_embedding(
    x: Tensor, cos: Tensor, sin: Tensor, num_heads: int, *, fused: bool = True
) -> Tensor:
    """Rotate pairs of neighbouring channels of each head (RoPE, arXiv 2104.09864).

    x [B, L, heads*D]; cos, sin [L, D/2]. The same as multiplying (x[2i] + j·x[2i+1]) by
    (cos[i] + j·sin[i]), which is how Meta's ViT does it, with complex numbers.
    """
    if fused and torch.onnx.is_in_onnx_export():
        first_row = torch.zeros(1, dtype=torch.int64)
        return _fused(
            "RotaryEmbedding", x, (x, first_row, cos, sin), num_heads=num_heads, interleaved=1
        )
    even, odd = x.reshape(*x.shape[:-1], num_heads, -1, 2).to(cos.dtype).unbind(-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-3)


def attention(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, *, fused: bool = True
) -> Tensor:
    """Multi-head scaled dot-product attention; all tensors [B, L, heads*D]."""
    if fused and torch.onnx.is_in_onnx_export():
        return _fused("MultiHeadAttention", query, (query, key, value), num_heads=num_heads)
    q, k, v = (t.reshape(*t.shape[:-1], num_heads, -1).transpose(1, 2) for t in (query, key, value))
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return attended.transpose(1, 2).flatten(2)


def skip_layer_norm(
    x: Tensor, skip: Tensor, norm: torch.nn.LayerNorm, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """The sum x + bias + skip, normalised and plain; all tensors [B, L, C], the bias [C]."""
    if torch.onnx.is_in_onnx_export():
        statistics = (*x.shape[:2], 1)
        normed, _, _, total = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::SkipLayerNormalization",
            (x, skip, norm.weight, norm.bias, bias),
            {"epsilon": norm.eps},
            dtypes=(x.dtype, torch.float32, torch.float32, x.dtype),
            shapes=(x.shape, statistics, statistics, x.shape),
            version=1,
        )
        return normed, total
    total = skip + (x + bias)
    return norm(total), total


def _fused(operator: str, like: Tensor, inputs: tuple[Tensor, ...], **attributes: int) -> Tensor:
    """A node in ONNX Runtime's own domain whose output has the type and shape of `like`."""
    return torch.onnx.ops.symbolic(
        f"com.microsoft::{operator}",
        inputs,
        dict(attributes),
        dtype=like.dtype,
        shape=like.shape,
        version=1,
    )
