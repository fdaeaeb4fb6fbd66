"""What an encoder is worth: the masks behind it against those behind Meta's modules in FP32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from export import check
from export.architecture import InteractiveModel
from export.check import Features, Prompt

GATE_TRAINED = 0.995
"""Worst mask IoU that is accepted with trained weights."""
GATE_RANDOM = 0.98
"""The same with random weights, whose logits crowd around zero."""


def worst_mask_iou(
    model: InteractiveModel,
    ours: Features,
    theirs: Features,
    prompts: Sequence[Prompt] = check.PROMPTS,
) -> float:
    """Smallest mask IoU over all prompts and candidates, both embeddings decoded in FP32."""
    return min(
        check.mask_iou(a, b)
        for prompt in prompts
        for a, b in zip(_masks(model, ours, prompt), _masks(model, theirs, prompt), strict=True)
    )


@torch.inference_mode()
def _masks(model: InteractiveModel, features: Features, prompt: Prompt) -> Tensor:
    """Logits of the three candidates [3, M, M]; a refined prompt is decoded twice."""
    wide = (features[0].float(), features[1].float(), features[2].float())
    coords = torch.tensor(prompt.coords)
    labels = torch.tensor(prompt.labels, dtype=torch.int32)
    logits = check.decode_reference(model, wide, coords, labels, None)
    if not prompt.refine:
        return logits
    return check.decode_reference(model, wide, coords, labels, logits[0].clamp(-32, 32))
