"""Asking Meta's own predictor, whose image is set, as a client is asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


def predict(
    meta: Any, prompt: Mapping[str, Any], multimask: bool, mask: Array | None = None
) -> tuple[Array, Array, Array]:
    """Masks [K, H, W], scores [K] and logits [K, M, M] of one object.

    prompt: of "points", each x, y, label, and "box", or one of them; mask: logits [1, M, M].
    """
    points = prompt.get("points")
    answer: tuple[Array, Array, Array] = meta.predict(
        point_coords=np.array([p[:2] for p in points]) if points else None,
        point_labels=np.array([p[2] for p in points]) if points else None,
        box=np.array(prompt["box"]) if "box" in prompt else None,
        mask_input=mask,
        multimask_output=multimask,
    )
    return answer
