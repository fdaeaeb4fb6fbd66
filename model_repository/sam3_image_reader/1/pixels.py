"""Checks prompts in pixels of one image and turns them into fractions of its sides."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sam3_shared.contract import LABEL_BOX_BOTTOM_RIGHT, LABEL_BOX_TOP_LEFT, LABEL_PADDING
from sam3_shared.geometry import to_fractions


class InvalidPoint(ValueError):
    """A point or box is not accepted; the message is the answer to the caller."""


def to_coords(
    points: NDArray[np.float32], labels: NDArray[np.int32], width: int, height: int
) -> NDArray[np.float32]:
    """Turn pixels [N, P, 2] with labels [N, P] into fractions [N, P, 2]; padding becomes zeros.

    As in the Python client, a box that extends beyond the image is clipped to it, and a point
    outside it is an error. All other checks of labels are left to the decoder.

    Raises:
        InvalidPoint: with a message that says what is wrong and what is accepted.
    """
    if 0 in points.shape:
        # It has no bytes but may claim any length: a request without data must not cost any work.
        raise InvalidPoint(
            f"points has shape {list(points.shape)}; give at least one object, and a point in each"
        )
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
    starts, ends = labels == LABEL_BOX_TOP_LEFT, labels == LABEL_BOX_BOTTOM_RIGHT
    # The decoder says what is wrong with half a box, or with two.
    (objects,) = np.nonzero((starts.sum(1) == 1) & (ends.sum(1) == 1))
    start = points[objects, starts[objects].argmax(1)]
    end = points[objects, ends[objects].argmax(1)]
    swapped = (start > end).any(1)
    outside = (start > (width, height)).any(1) | (end < 0).any(1)
    for row in np.flatnonzero(swapped | outside)[:1]:
        box, n = [*start[row].tolist(), *end[row].tolist()], objects[row]
        if swapped[row]:
            raise InvalidPoint(
                f"the box {box} of object {n} has its corners the wrong way round; give the "
                "top-left corner (label 2) and the bottom-right one (label 3) in pixels"
            )
        raise InvalidPoint(
            f"the box {box} of object {n} lies entirely outside the {width}×{height} image"
        )
