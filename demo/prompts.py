"""Simulated users: where they click first, what box they draw, and where they correct."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Point = tuple[float, float]
"""x, y in pixels."""


def interior(mask: Mask) -> Point:
    """The pixel of a mask farthest from its outside (beyond the picture's border is outside)."""
    padded = np.pad(mask.astype(np.uint8), 1)
    depth = cv2.distanceTransform(padded, cv2.DIST_L2, 3)[1:-1, 1:-1]
    y, x = divmod(int(depth.argmax()), mask.shape[1])
    return float(x), float(y)


def anywhere(mask: Mask, rng: np.random.Generator) -> Point:
    """A pixel of a mask, uniformly at random."""
    pixels = np.flatnonzero(mask)
    y, x = divmod(int(rng.choice(pixels)), mask.shape[1])
    return float(x), float(y)


def box(mask: Mask) -> tuple[float, float, float, float]:
    """The tight box of a mask: x0, y0, x1, y1 in pixels, the last two exclusive."""
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    return float(x), float(y), float(x + width), float(y + height)


def correction(predicted: Mask, truth: Mask) -> tuple[Mask, bool]:
    """The largest connected error, and whether it is missing (a positive click) or superfluous."""
    wrong = (predicted != truth).astype(np.uint8)
    if not wrong.any():
        return truth, True
    _, regions, stats, _ = cv2.connectedComponentsWithStats(
        # Stacked, so that missing and superfluous pixels that touch are two errors.
        np.concatenate([wrong * truth, np.zeros_like(wrong[:1]), wrong * predicted]),
        connectivity=8,
    )
    largest = regions == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    missing, superfluous = largest[: len(wrong)], largest[len(wrong) + 1 :]
    return (missing, True) if missing.any() else (superfluous, False)


def iou(predicted: Mask, truth: Mask) -> float:
    """Intersection over union of two masks; 1 if both are empty."""
    union = (predicted | truth).sum()
    return float((predicted & truth).sum() / union) if union else 1.0
