"""Checks prompts in pixels of one image and turns them into fractions of its sides."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sam3_shared.contract import LABEL_BOX_BOTTOM_RIGHT, LABEL_BOX_TOP_LEFT, LABEL_PADDING
from sam3_shared.geometry import to_fractions


class InvalidPoint(ValueError):
    """A point or box that is not accepted; the message is the answer to the caller."""


def to_coords(
    points: NDArray[np.float32], labels: NDArray[np.int32], width: int, height: int
) -> NDArray[np.float32]:
    """Turn pixels [N, P, 2] with labels [N, P] into fractions [N, P, 2]; padding becomes zeros.

    As in the Python client, a box that overshoots the image is clipped to it, and a point outside
    is an error. All other checks of labels are left to the decoder.

    Raises:
        InvalidPoint: with a message that says what is wrong and what is accepted.
    """
    if labels.shape != points.shape[:2]:
        raise InvalidPoint(
            f"point_labels has shape {list(labels.shape)}; expected {list(points.shape[:2])}, one "
            "label for each pair of points"
        )
    size = np.array([width, height], np.float32)
    corners = (labels == LABEL_BOX_TOP_LEFT) | (labels == LABEL_BOX_BOTTOM_RIGHT)
    clips = corners[..., None] & np.isfinite(points)
    inside = np.where(clips, np.clip(points, 0, size), points)
    inside[labels == LABEL_PADDING] = 0
    _check_points(inside, width, height)
    _check_boxes(points, labels, width, height)
    return np.asarray(to_fractions(inside, width, height), np.float32)


def _check_points(points: NDArray[np.float32], width: int, height: int) -> None:
    outside = ~((points >= 0) & (points <= (width, height))).all(axis=-1)
    for n, p in np.argwhere(outside)[:1]:
        x, y = points[n, p]
        raise InvalidPoint(
            f"points[{n}, {p}] is ({x:g}, {y:g}); x must be within 0…{width} and y within "
            f"0…{height}, in pixels of the image as displayed"
        )


def _check_boxes(
    points: NDArray[np.float32], labels: NDArray[np.int32], width: int, height: int
) -> None:
    for n, kinds in enumerate(labels):
        start, end = (
            points[n, kinds == LABEL_BOX_TOP_LEFT],
            points[n, kinds == LABEL_BOX_BOTTOM_RIGHT],
        )
        if len(start) != 1 or len(end) != 1:
            continue  # the decoder reports half a box
        box = [*start[0].tolist(), *end[0].tolist()]
        if (start > end).any():
            raise InvalidPoint(
                f"the box {box} of object {n} has its corners the wrong way round; give the "
                "top-left corner (label 2) and the bottom-right one (label 3) in pixels"
            )
        if (start > (width, height)).any() or (end < 0).any():
            raise InvalidPoint(
                f"the box {box} of object {n} lies entirely outside the {width}×{height} image"
            )
