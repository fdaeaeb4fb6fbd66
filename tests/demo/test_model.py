"""The demo model: the fused neck equals Meta's, sizes change, prompts reach the decoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from demo.model import (
    Prompts,
    build,
    decode,
    encode,
    init_patch_embedding,
    normalise,
    resized,
    sized,
)
from export.architecture import InteractiveModel

SIZE = 112


@pytest.fixture(scope="module")
def model() -> InteractiveModel:
    return build(0, SIZE).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def images() -> Tensor:
    rng = np.random.default_rng(0)
    return normalise(torch.from_numpy(rng.integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)))


def test_pixels_become_minus_one_to_one() -> None:
    white = torch.full((1, 2, 2, 3), 255, dtype=torch.uint8)
    assert normalise(white).shape == (1, 3, 2, 2)
    assert normalise(white).max() == 1
    assert normalise(white * 0).min() == -1


def test_the_fused_neck_equals_the_model_s(model: InteractiveModel, images: Tensor) -> None:
    for wanted, got in zip(model.encode(images), encode(model, images), strict=True):
        assert (wanted - got).abs().max() < 1e-4 * wanted.abs().max()


def test_decoding_gives_four_candidates_for_every_object(
    model: InteractiveModel, images: Tensor
) -> None:
    points = Prompts(torch.rand(5, 2, 2) * SIZE, torch.ones(5, 2, dtype=torch.int32))
    answer = decode(model, encode(model, images), torch.tensor([0, 1, 1, 0, 1]), points)
    side = model.architecture.mask_size
    assert answer.logits.shape == (5, 4, side, side)
    assert answer.ious.shape == (5, 4)
    assert set(answer.best.tolist()) <= {1, 2, 3}


def test_an_object_is_answered_as_if_it_were_alone(model: InteractiveModel, images: Tensor) -> None:
    features = encode(model, images)
    coords, labels = torch.rand(4, 1, 2) * SIZE, torch.ones(4, 1, dtype=torch.int32)
    owner = torch.tensor([1, 0, 1, 0])
    together = decode(model, features, owner, Prompts(coords, labels))
    alone = decode(model, features, owner[2:3], Prompts(coords[2:3], labels[2:3]))
    assert torch.allclose(together.logits[2], alone.logits[0], atol=1e-4)


def test_resizing_keeps_the_weights_and_has_the_sizes_asked_for(model: InteractiveModel) -> None:
    larger = resized(model, 3 * SIZE)
    assert larger.architecture == sized(3 * SIZE)
    assert torch.equal(larger.neck[0].conv_3x3.weight, model.neck[0].conv_3x3.weight)
    assert larger.trunk.pos_embed.shape[1] == larger.architecture.grid**2 + 1
    again = resized(larger, SIZE)
    assert torch.allclose(again.trunk.pos_embed, model.trunk.pos_embed, atol=0.05)


def test_patches_start_as_their_principal_components() -> None:
    model = build(0, SIZE)
    rng = np.random.default_rng(0)
    tint = rng.integers(0, 256, (8, 1, 1, 3), dtype=np.uint8)
    init_patch_embedding(model, np.broadcast_to(tint, (8, SIZE, SIZE, 3)))
    filters = model.trunk.patch_embed.proj.weight.flatten(1)
    strongest = filters[-3:].view(3, 3, -1)
    assert strongest.std(-1).max() < 1e-2 * strongest.abs().max()
