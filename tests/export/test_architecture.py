"""Sizes read from checkpoints, and Meta's modules built to them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.reference import meta_predictor
from export import checkpoint
from export.architecture import TRUNK, Architecture, InteractiveModel, SizeError
from tests.export import tiny


def _weights(model: InteractiveModel) -> dict[str, Tensor]:
    return {
        prefix + key: value
        for prefix, module in model.layout().items()
        for key, value in module.state_dict().items()
    }


@st.composite
def _architectures(draw: Any) -> Architecture:
    """Small ones with distinct sizes: some block is windowed, the last is global."""

    def size(low: int, high: int, times: int = 1) -> int:
        return times * int(draw(st.integers(low, high)))

    patch, heads, depth, window = size(1, 7, 2), size(1, 3), size(2, 3), size(1, 5)
    grid = draw(st.integers(1, 8).filter(lambda n: n != window))
    globals_before = draw(st.sets(st.integers(0, depth - 2), max_size=depth - 2))
    return Architecture(
        image_size=grid * patch,
        patch_size=patch,
        pretrain_image_size=size(1, 3) * patch,
        embed_dim=size(1, 3, 4 * heads),
        depth=depth,
        num_heads=heads,
        mlp_dim=size(1, 99),
        window_size=window,
        global_att_blocks=(*sorted(globals_before), depth - 1),
        d_model=size(1, 3, 16),
        decoder_depth=size(1, 2),
        decoder_mlp_dim=size(1, 40),
        iou_head_hidden_dim=size(1, 40),
        mask_in_chans=size(1, 4, 4),
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(_architectures())
def test_sizes_are_read_from_the_weights(architecture: Architecture) -> None:
    assert Architecture.from_weights(_weights(InteractiveModel(architecture))) == architecture


def _without_tables(embed_dim: int, depth: int) -> dict[str, Tensor]:
    """The tiny model's weights that sizes are read from, for a trunk of these sizes."""
    weights = _weights(InteractiveModel(tiny.ARCHITECTURE))
    kept = {key: value for key, value in weights.items() if not key.endswith("freqs_cis")}
    blocks = {f"{TRUNK}blocks.{i}.norm1.weight": torch.ones(embed_dim) for i in range(depth)}
    return kept | blocks | {f"{TRUNK}patch_embed.proj.weight": torch.ones(embed_dim, 3, 14, 14)}


def test_without_rotary_tables_the_published_model_is_assumed() -> None:
    published = Architecture()
    weights = _without_tables(published.embed_dim, published.depth)
    assert Architecture.from_weights(weights) == replace(
        published,
        pretrain_image_size=tiny.ARCHITECTURE.pretrain_image_size,
        mlp_dim=tiny.ARCHITECTURE.mlp_dim,
        d_model=tiny.ARCHITECTURE.d_model,
        decoder_depth=tiny.ARCHITECTURE.decoder_depth,
        decoder_mlp_dim=tiny.ARCHITECTURE.decoder_mlp_dim,
        iou_head_hidden_dim=tiny.ARCHITECTURE.iou_head_hidden_dim,
    )


@pytest.mark.parametrize(("embed_dim", "depth"), [(64, 32), (1024, 2)])
def test_without_rotary_tables_another_trunk_is_rejected(embed_dim: int, depth: int) -> None:
    says = f"a trunk of {depth} blocks and {embed_dim} channels without rotary tables"
    with pytest.raises(SizeError, match=says):
        Architecture.from_weights(_without_tables(embed_dim, depth))


def test_a_single_missing_rotary_table_is_named() -> None:
    weights = _weights(InteractiveModel(tiny.ARCHITECTURE))
    del weights[f"{TRUNK}blocks.1.attn.freqs_cis"]
    with pytest.raises(KeyError, match=r"blocks\.1\.attn\.freqs_cis"):
        Architecture.from_weights(weights)


def test_published_sizes() -> None:
    published = Architecture()
    assert (published.image_size, published.grid, published.mask_size) == (1008, 72, 288)


@pytest.mark.parametrize(
    ("image_size", "nearest"), [(1000, "994, 1008"), (13, "14"), (0, "14"), (-20, "14")]
)
def test_an_image_size_that_is_not_a_multiple_of_the_patch_is_rejected(
    image_size: int, nearest: str
) -> None:
    with pytest.raises(SizeError, match=f"image size {image_size} .* the nearest: {nearest}$"):
        Architecture(image_size=image_size)


def test_sizes_that_cannot_be_built_are_rejected() -> None:
    with pytest.raises(SizeError, match="1024 channels cannot be split among 7 heads"):
        Architecture(num_heads=7)
    with pytest.raises(SizeError, match="d_model 100 is not a multiple of 16"):
        Architecture(d_model=100)


@pytest.mark.parametrize("image_size", [112, 126])
def test_encode_is_what_metas_predictor_embeds(tmp_path: Path, image_size: int) -> None:
    """At a size where windows fit the grid, and at one where Meta's ViT pads them."""
    path = tmp_path / "tiny.pt"
    tiny.save(path, tiny.resized(image_size))
    pixels = np.random.default_rng(0).integers(0, 256, (image_size, image_size, 3), dtype=np.uint8)
    predictor = meta_predictor(path)
    predictor.set_image(pixels)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.inference_mode():
        ours = checkpoint.load(path).encode(image)
    theirs = (predictor._features["image_embed"], *predictor._features["high_res_feats"])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
