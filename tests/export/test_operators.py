"""Real arithmetic and plain attention against what Meta's ViT computes."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sam3.model.vitdet import apply_rotary_enc, compute_axial_cis

from export.operators import attention, rotary_embedding

sizes = st.integers(1, 4)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(images=sizes, heads=sizes, quarter=sizes, side=sizes)
def test_rotation_is_the_same_as_metas_in_complex_numbers(
    images: int, heads: int, quarter: int, side: int
) -> None:
    dim, tokens = 4 * quarter, side * side
    generator = torch.Generator().manual_seed(images + 10 * heads + 100 * dim + 1000 * side)
    x = torch.randn(images, tokens, heads * dim, generator=generator)
    table = compute_axial_cis(dim, side, side)
    split = x.reshape(images, tokens, heads, dim).transpose(1, 2)
    theirs, _ = apply_rotary_enc(split, split, table)
    ours = rotary_embedding(x, table.real, table.imag, heads)
    torch.testing.assert_close(ours, theirs.transpose(1, 2).flatten(2), rtol=0, atol=1e-6)


def test_rotation_in_half_precision_stays_in_half_precision() -> None:
    table = compute_axial_cis(8, 3, 3)
    x = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(0))
    half = rotary_embedding(x.half(), table.real.half(), table.imag.half(), 2)
    assert half.dtype == torch.float16
    torch.testing.assert_close(
        half.float(), rotary_embedding(x, table.real, table.imag, 2), rtol=0, atol=5e-3
    )


def test_attention_is_the_same_as_computed_by_hand() -> None:
    heads, dim = 3, 4
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 5, heads * dim, generator=generator)
    parts = []
    for head in range(heads):
        channels = slice(head * dim, (head + 1) * dim)
        scores = query[..., channels] @ key[..., channels].transpose(1, 2) / dim**0.5
        parts.append(scores.softmax(-1) @ value[..., channels])
    torch.testing.assert_close(attention(query, key, value, heads), torch.cat(parts, -1))
