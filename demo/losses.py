"""The demo model's losses: masks, their predicted quality, and masks from single pixels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from demo.model import Answer, Features
from export.architecture import InteractiveModel

BCE_WEIGHT = 4.0
OTHER_CANDIDATES = 1.0
"""Weight of the multimask candidates' mean loss relative to the best one's. A prompt means one
object here, so they have little reason to differ; with 0.1 each was worse than the single-mask one,
and the predicted IoU did not make up for it."""


def mask_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Binary cross-entropy plus dice of FP32 [..., M, M] logits against coverage in [0, 1]: [...].

    Truth is the share of each cell that the object covers, hence the soft targets.
    """
    truth = truth.expand_as(logits)
    entropy = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    probability = logits.sigmoid()
    overlap = 2 * (probability * truth).sum((-1, -2))
    dice = 1 - (overlap + 1) / (probability.sum((-1, -2)) + truth.sum((-1, -2)) + 1)
    return BCE_WEIGHT * entropy.mean((-1, -2)) + dice


@torch.no_grad()
def true_ious(logits: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union on the low-resolution grid, FP32 [...]."""
    predicted, actual = logits > 0, (truth > 0.5).expand_as(logits)
    union = (predicted | actual).sum((-1, -2)).clamp(min=1)
    return (predicted & actual).sum((-1, -2)) / union


def answer_loss(answer: Answer, truth: Tensor) -> Tensor:
    """Loss of N objects' candidates; truth: FP32 [N, M, M].

    The single-mask candidate always learns; among the three others, the best one counts twice.
    """
    losses = mask_loss(answer.logits, truth[:, None])
    single, several = losses[:, 0], losses[:, 1:]
    chosen = several.min(1).values + OTHER_CANDIDATES * several.mean(1)
    quality = (answer.ious - true_ious(answer.logits, truth[:, None])).square().mean(1)
    return (single + chosen + quality).mean()


def pixel_loss(
    model: InteractiveModel, features: Features, owner: Tensor, places: Tensor, truth: Tensor
) -> Tensor:
    """Loss of masks made without the decoder's transformer, each from one pixel's embedding.

    It is cheap, so many pixels can contribute, and it trains the trunk, neck, upscaling and
    hypernetwork before a prompt token has learnt to look where it points.
    owner: INT64 [N], which cycles through the pictures; places: FP32 [N, 2], x, y as shares of the
    picture; truth: FP32 [N, M, M].
    """
    image_embed, high_res_feats_0, high_res_feats_1 = features
    decoder = model.mask_decoder
    first, norm, first_act, second, second_act = decoder.output_upscaling
    upscaled = first_act(norm(first(image_embed) + high_res_feats_1))
    upscaled = second_act(second(upscaled) + high_res_feats_0)
    queries = _sample(image_embed, owner, places)
    weights = decoder.output_hypernetworks_mlps[0](queries)
    weights = weights.view(-1, len(upscaled), weights.shape[-1])
    logits = torch.einsum("kbc,bchw->kbhw", weights, upscaled)
    return mask_loss(logits, truth.view_as(logits)).mean()


def _sample(maps: Tensor, owner: Tensor, places: Tensor) -> Tensor:
    """Sample [B, C, H, W] maps bilinearly at N places of their pictures: [N, C]."""
    height, width = maps.shape[-2:]
    x = (places[:, 0] * width - 0.5).clamp(0, width - 1)
    y = (places[:, 1] * height - 0.5).clamp(0, height - 1)
    x0, y0 = x.floor().long().clamp(max=width - 2), y.floor().long().clamp(max=height - 2)
    right, down = (x - x0)[:, None], (y - y0)[:, None]
    upper = maps[owner, :, y0, x0] * (1 - right) + maps[owner, :, y0, x0 + 1] * right
    lower = maps[owner, :, y0 + 1, x0] * (1 - right) + maps[owner, :, y0 + 1, x0 + 1] * right
    return upper * (1 - down) + lower * down
