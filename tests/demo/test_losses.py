"""Losses: right answers cost less, and every part of the model gets a gradient."""

from __future__ import annotations

import pytest
import torch

from demo.losses import OTHER_CANDIDATES, answer_loss, mask_loss, pixel_loss, true_ious
from demo.model import Answer, build, encode

SIZE = 112


@pytest.fixture
def truth() -> torch.Tensor:
    mask = torch.zeros(2, 8, 8)
    mask[0, 2:6, 2:6] = 1
    mask[1, :, :3] = 1
    return mask


def test_a_right_mask_has_almost_no_loss_and_a_wrong_one_a_large_loss(truth: torch.Tensor) -> None:
    right = mask_loss((truth - 0.5) * 40, truth)
    wrong = mask_loss((0.5 - truth) * 40, truth)
    assert right.shape == (2,)
    assert right.max() < 0.01
    assert wrong.min() > 1


def test_true_iou_counts_cells(truth: torch.Tensor) -> None:
    shifted = torch.roll(truth, 2, dims=2)
    assert true_ious(truth - 0.5, truth).tolist() == [1, 1]
    assert true_ious(shifted - 0.5, truth)[0] == pytest.approx(8 / 24)
    assert true_ious(-torch.ones_like(truth), truth).tolist() == [0, 0]


def test_every_candidate_learns_and_the_best_one_most(truth: torch.Tensor) -> None:
    logits = torch.zeros(2, 4, 8, 8)
    logits[:, [0, 2]] = ((truth - 0.5) * 4)[:, None]  # alike; 1 and 3 are worse
    logits.requires_grad_()
    answer_loss(Answer(logits, torch.zeros(2, 4)), truth).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    shares = logits.grad.abs().mean((0, 2, 3))
    third = OTHER_CANDIDATES / 3
    assert shares[2] == pytest.approx((1 + third) * shares[0])
    alone = torch.zeros(2, 8, 8, requires_grad=True)
    mask_loss(alone, truth).mean().backward()  # type: ignore[no-untyped-call]
    assert alone.grad is not None
    assert shares[1] == shares[3] == pytest.approx(third * alone.grad.abs().mean().item())


def test_predicted_quality_is_pulled_to_the_true_one(truth: torch.Tensor) -> None:
    ious = torch.full((2, 4), 0.5, requires_grad=True)
    logits = torch.stack([(truth - 0.5) * 4, *[-torch.ones_like(truth)] * 3], 1)
    answer_loss(Answer(logits, ious), truth).backward()  # type: ignore[no-untyped-call]
    assert ious.grad is not None
    assert (ious.grad[:, 0] < 0).all()
    assert (ious.grad[:, 1:] > 0).all()


def test_the_pixel_loss_reaches_trunk_neck_upscaling_and_hypernetwork() -> None:
    model = build(0, SIZE)
    side = model.architecture.mask_size
    features = encode(model, torch.randn(2, 3, SIZE, SIZE))
    loss = pixel_loss(
        model, features, torch.tensor([0, 1, 0, 1]), torch.rand(4, 2), torch.rand(4, side, side)
    )
    loss.backward()  # type: ignore[no-untyped-call]
    decoder = model.mask_decoder
    for weight in (
        model.trunk.patch_embed.proj.weight,
        model.neck[0].conv_3x3.weight,
        decoder.output_upscaling[0].weight,
        decoder.output_hypernetworks_mlps[0].layers[0].weight,
    ):
        assert weight.grad is not None
        assert weight.grad.abs().sum() > 0
    assert decoder.iou_token.weight.grad is None


def test_a_pixel_is_sampled_only_from_its_own_picture() -> None:
    """The pixel loss takes objects interleaved by picture: 0, 1, 0, 1."""
    model = build(0, SIZE)
    side = model.architecture.mask_size
    images = torch.randn(2, 3, SIZE, SIZE, requires_grad=True)
    truth = torch.rand(2, side, side)
    arguments = torch.tensor([0, 1]), torch.rand(2, 2), truth
    both = pixel_loss(model, encode(model, images), *arguments)
    single = [
        pixel_loss(
            model,
            encode(model, images[i : i + 1]),
            torch.tensor([0]),
            arguments[1][i : i + 1],
            truth[i : i + 1],
        )
        for i in range(2)
    ]
    assert both.item() == pytest.approx(sum(s.item() for s in single) / 2, rel=1e-4)
