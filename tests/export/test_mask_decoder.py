"""The rearranged mask decoder: each part against Meta's with the same weights."""

from __future__ import annotations

import pytest
import torch

from export.architecture import InteractiveModel
from export.mask_decoder import MergedTwoWay, as_rows
from tests.export import tiny

E, C = tiny.ARCHITECTURE.grid, tiny.ARCHITECTURE.d_model


@pytest.mark.parametrize("objects", [1, 3])
@pytest.mark.parametrize("tokens", [6, 8, 30])
@torch.inference_mode()
def test_merged_projections_attend_like_metas(
    model: InteractiveModel, objects: int, tokens: int
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    image = torch.randn(objects, C, E, E, generator=generator)
    image_pe = torch.randn(1, C, E, E, generator=generator)
    queries = torch.randn(objects, tokens, C, generator=generator)
    transformer = model.mask_decoder.transformer
    ours = MergedTwoWay(transformer)(as_rows(image), as_rows(image_pe), queries)
    for a, b in zip(ours, transformer(image, image_pe, queries), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
