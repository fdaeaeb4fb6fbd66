"""Accuracy of an encoder: masks decoded from its embeddings against those from Meta's in FP32."""

from __future__ import annotations

from functools import partial

from export import check
from export.architecture import InteractiveModel
from export.check import Candidates, Features, Prompt

GATE_TRAINED = 0.995
"""Lowest accepted mask IoU with trained weights."""
GATE_RANDOM = 0.98
"""The same with random weights, whose logits crowd around zero."""


def worst_mask_iou(model: InteractiveModel, ours: Features, theirs: Features) -> float:
    """The lowest mask IoU over all prompts, with both sets of embeddings decoded in FP32."""

    def candidates(features: Features, prompt: Prompt) -> Candidates:
        wide = (features[0].float(), features[1].float(), features[2].float())
        return check.decode(prompt, partial(check.decode_reference, model, wide))

    side = model.architecture.image_size
    return min(
        check.answer_iou(candidates(ours, prompt), candidates(theirs, prompt), side)
        for prompt in check.PROMPTS
    )
