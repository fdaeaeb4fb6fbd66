"""Validation of one image's prompts: what a request may contain, and the errors if it does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PADDING, NEGATIVE, POSITIVE, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT = range(-1, 4)


class InvalidPrompt(ValueError):
    """A prompt is not accepted; the message is the answer to the caller."""


@dataclass(frozen=True)
class Limits:
    """Limits of one request."""

    max_objects: int
    """In all its images together."""
    max_tokens: int
    """Of one object."""
    mask_size: int


@dataclass(frozen=True)
class ObjectPrompt:
    """One object: T tokens, including the trailing not-a-point token if there are any."""

    coords: NDArray[np.float32]
    """[T, 2], x and y as fractions of the image's width and height."""
    labels: NDArray[np.int32]
    """[T]"""
    mask: Tensor | None
    """[M, M] logits to refine."""

    @property
    def tokens(self) -> int:
        return len(self.labels)


def parse_prompts(
    coords: NDArray[np.float32], labels: NDArray[np.int32], masks: Tensor | None, limits: Limits
) -> list[ObjectPrompt]:
    """Check the prompts of one image and strip the padding.

    Args:
        coords: FP32 [N, P, 2]; labels: INT32 [N, P]; masks: [N, M, M] logits, where a plane of
            NaN means "no mask".

    Raises:
        InvalidPrompt: with a message that says what is wrong and what is accepted.
    """
    _check_shapes(coords, labels, masks, limits)
    # The extremes show that clicks are valid in half the time that checking each token takes.
    lowest, highest = (labels.min(), labels.max()) if labels.size else (PADDING, PADDING)
    if not (lowest >= NEGATIVE and highest <= POSITIVE and _inside(coords)):
        _check_tokens(coords, labels)
    has_mask = _check_masks(masks, len(labels))
    if lowest == PADDING:
        _check_objects(labels, has_mask)
    coords, labels = _with_one_more(coords, labels)
    counts = _counts(labels) if lowest == PADDING else [slice(None)] * len(labels)
    return [
        ObjectPrompt(
            coords[n][counts[n]],
            labels[n][counts[n]],
            masks[n] if masks is not None and has_mask[n] else None,
        )
        for n in range(len(labels))
    ]


def check_objects(images: int, objects: int, limits: Limits) -> None:
    """Check how many objects a request has in all its images: they are decoded together.

    Raises:
        InvalidPrompt: with a message that says what is wrong and what is accepted.
    """
    if images * objects > limits.max_objects:
        asked = f"{objects} objects" + (f" in each of {images} images" if images > 1 else "")
        raise InvalidPrompt(
            f"{asked} in one request; at most {limits.max_objects} in all its images are accepted: "
            "split the request (keep_image avoids encoding an image again)"
        )


def _with_one_more(
    coords: NDArray[np.float32], labels: NDArray[np.int32]
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Append the not-a-point token that SAM adds to an object with a point or a box."""
    objects, tokens = labels.shape
    more_coords = np.zeros((objects, tokens + 1, 2), np.float32)
    more_labels = np.full((objects, tokens + 1), PADDING, np.int32)
    more_coords[:, :-1] = coords
    more_labels[:, :-1] = labels
    return more_coords, more_labels


def _counts(labels: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Which tokens count: all but padding, and the last one if there is any other."""
    counts: NDArray[np.bool_] = labels != PADDING
    counts[:, -1] = counts.any(axis=1)
    return counts


def _check_shapes(
    coords: NDArray[np.float32], labels: NDArray[np.int32], masks: Tensor | None, limits: Limits
) -> None:
    if coords.ndim != 3 or coords.shape[-1] != 2:
        raise InvalidPrompt(
            f"point_coords has shape {list(coords.shape)}; expected [N, P, 2]: N objects of P "
            "tokens with x and y"
        )
    if labels.shape != coords.shape[:2]:
        raise InvalidPrompt(
            f"point_labels has shape {list(labels.shape)}; expected {list(coords.shape[:2])}, "
            "one label for each pair of point_coords"
        )
    objects, tokens = labels.shape
    if tokens > limits.max_tokens:
        raise InvalidPrompt(
            f"{tokens} tokens per object; at most {limits.max_tokens} are accepted (a point is one "
            "token, a box two): send fewer points"
        )
    size = limits.mask_size
    if masks is not None and tuple(masks.shape) != (objects, size, size):
        raise InvalidPrompt(
            f"mask_input has shape {list(masks.shape)}; expected [{objects}, {size}, {size}]: the "
            "low_res_masks of an earlier answer, one for each object"
        )


def _inside(coords: NDArray[np.float32]) -> bool:
    return bool(coords.min() >= 0 and coords.max() <= 1)  # both are false for NaN


def _check_tokens(coords: NDArray[np.float32], labels: NDArray[np.int32]) -> None:
    _refuse_first(
        (labels < PADDING) | (labels > BOX_BOTTOM_RIGHT),
        lambda n, p: (
            f"point_labels[{n}, {p}] is {labels[n, p]}; accepted are 1 (positive point), "
            "0 (negative point), 2 and 3 (a box's top-left and bottom-right corner), -1 (padding)"
        ),
    )
    _refuse_first(
        ~((coords >= 0) & (coords <= 1)).all(axis=-1) & (labels != PADDING),
        lambda n, p: (
            f"point_coords[{n}, {p}] is ({coords[n, p, 0]:g}, {coords[n, p, 1]:g}); x and y must "
            "be finite fractions of the image's width and height, from 0 to 1"
        ),
    )
    corners = [(labels == label).sum(axis=1) for label in (BOX_TOP_LEFT, BOX_BOTTOM_RIGHT)]
    _refuse_first(
        (corners[0] != corners[1]) | (corners[0] > 1),
        lambda n: (
            f"object {n} has {corners[0][n]} top-left (label 2) and {corners[1][n]} bottom-right "
            "(label 3) box corners; an object has one box, with both corners, or none"
        ),
    )
    top_left, bottom_right = (coords[labels == label] for label in (BOX_TOP_LEFT, BOX_BOTTOM_RIGHT))
    swapped = corners[0] == 1
    swapped[swapped] = (top_left > bottom_right).any(axis=1)
    _refuse_first(
        swapped,
        lambda n: (
            f"the box of object {n} has its corners the wrong way round: label 2 is its top-left "
            "corner, where x and y are smallest, and label 3 its bottom-right one"
        ),
    )


def _check_objects(labels: NDArray[np.int32], has_mask: NDArray[np.bool_]) -> None:
    _refuse_first(
        (labels == PADDING).all(axis=1) & ~has_mask,
        lambda n: (
            f"object {n} has neither a point nor a box nor a mask; give it at least one of them"
        ),
    )


def _check_masks(masks: Tensor | None, objects: int) -> NDArray[np.bool_]:
    """Which objects have a mask to refine."""
    if masks is None:
        return np.zeros(objects, dtype=np.bool_)
    planes = masks.flatten(1)
    # In a tenth of the time that checking each logit takes. A sum in FP32 cannot overflow: FP16's
    # largest values have a finite one.
    if planes.sum(dim=1, dtype=torch.float32).isfinite().all():
        return np.ones(objects, dtype=np.bool_)
    absent = planes.isnan().all(dim=1)
    finite = planes.isfinite().all(dim=1)
    absent_or_finite = torch.stack((absent, finite)).cpu().numpy()
    _refuse_first(
        ~absent_or_finite.any(axis=0),
        lambda n: (
            f"mask_input[{n}] has NaN or infinite logits; all must be finite, or all NaN if "
            "the object has no mask"
        ),
    )
    return ~np.asarray(absent_or_finite[0], dtype=np.bool_)


def _refuse_first(wrong: NDArray[np.bool_], sentence: Callable[..., str]) -> None:
    if wrong.any():
        raise InvalidPrompt(sentence(*(int(i) for i in np.argwhere(wrong)[0])))
