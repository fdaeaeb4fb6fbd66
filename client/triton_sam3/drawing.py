"""Visualisation: masks overlaid on the image, with outlines and the prompts they came from."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from .prompts import Prompt

POSITIVE_COLOUR = (46, 204, 64)
NEGATIVE_COLOUR = (255, 65, 54)
BOX_COLOUR = (255, 220, 0)
RIM_COLOUR = (255, 255, 255)

GOLDEN_RATIO = (5**0.5 - 1) / 2
"""Steps of this size around the colour wheel keep any number of neighbouring colours apart."""


def colour(index: int) -> tuple[int, int, int]:
    """RGB colour (0 to 255) of object `index`, the same in every picture."""
    red, green, blue = colorsys.hsv_to_rgb((0.58 + index * GOLDEN_RATIO) % 1, 0.85, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def overlay(
    image: NDArray[np.uint8],
    masks: NDArray[np.bool_],
    prompts: Iterable[Prompt] = (),
    opacity: float = 0.5,
) -> NDArray[np.uint8]:
    """Return a copy of RGB uint8 [H, W, 3] with masks [N, H, W] tinted and outlined on it.

    opacity: 0 leaves the image under a mask as it is, 1 covers it. Prompts are drawn on top.
    """
    canvas = image.copy()
    thickness = max(1, round(max(image.shape[:2]) / 500))
    outlines = [_tint(canvas, mask, colour(index), opacity) for index, mask in enumerate(masks)]
    for index, rings in enumerate(outlines):  # over all tints, so that none is hidden
        cv2.drawContours(canvas, rings, -1, colour(index), thickness, cv2.LINE_AA)
    for prompt in prompts:
        _draw_prompt(canvas, prompt, thickness)
    return canvas


def _tint(
    canvas: NDArray[np.uint8], mask: NDArray[np.bool_], rgb: tuple[int, int, int], opacity: float
) -> Sequence[Any]:
    """Blend a colour into the canvas where the mask is; return the mask's outlines."""
    x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
    if not width:
        return []
    window = canvas[y : y + height, x : x + width]
    inside = mask[y : y + height, x : x + width]
    dimmed = cv2.convertScaleAbs(window, alpha=1 - opacity)
    tinted = cv2.add(dimmed, tuple(opacity * level for level in (*rgb, 0)))
    cv2.copyTo(tinted, inside.view(np.uint8), window)
    rings: Sequence[Any] = cv2.findContours(
        inside.view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE, offset=(x, y)
    )[0]
    return rings


def _draw_prompt(canvas: NDArray[np.uint8], prompt: Prompt, thickness: int) -> None:
    if prompt.box is not None:
        x_min, y_min, x_max, y_max = (round(side) for side in prompt.box)
        cv2.rectangle(canvas, (x_min, y_min), (x_max, y_max), BOX_COLOUR, thickness)
    for point in prompt.points:
        centre = (round(point.x), round(point.y))
        rgb = POSITIVE_COLOUR if point.positive else NEGATIVE_COLOUR
        cv2.circle(canvas, centre, 5 * thickness, RIM_COLOUR, cv2.FILLED, cv2.LINE_AA)
        cv2.circle(canvas, centre, 4 * thickness, rgb, cv2.FILLED, cv2.LINE_AA)
