"""Prompts: what a caller says about an object, validated and packed for the wire.

    points  ─parse_points─►  Point…  ┐
    boxes   ─parse_boxes──►  Prompt… ├─to_prompts─►  Prompt… ─pack─► point_coords, point_labels,
    earlier logits ──────────────────┘  (one Prompt = one object)    mask_input

Coordinates are absolute pixels of the caller's image, x to the right and y down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .contract import (
    LABEL_BOX_BOTTOM_RIGHT,
    LABEL_BOX_TOP_LEFT,
    LABEL_NEGATIVE,
    LABEL_PADDING,
    LABEL_POSITIVE,
)
from .errors import PromptError
from .geometry import to_fractions
from .parsing import (
    BOX_FORMS,
    Box,
    Point,
    convert_each,
    parse_box,
    parse_class_id,
    parse_list,
    parse_mask,
    parse_points,
)

FOREGROUND_CLASS_ID = -1
FOREGROUND_CLASS_NAME = "foreground"


class HasXYXY(Protocol):
    """`supervision.Detections`, and similar detections of other libraries."""

    @property
    def xyxy(self) -> Any:
        """Boxes [n, 4]: x_min, y_min, x_max, y_max in pixels."""


PointsLike: TypeAlias = (
    Sequence[Point | Sequence[float] | Mapping[str, Any] | NDArray[Any]] | NDArray[Any]
)
"""Points of one object: what `parse_points` accepts."""

BoxesLike: TypeAlias = (
    Sequence[Box | Sequence[float] | Mapping[str, Any] | NDArray[Any]]
    | NDArray[Any]
    | Mapping[str, Any]
    | HasXYXY
)
"""Boxes, one object each: what `parse_boxes` accepts."""


@dataclass(frozen=True, eq=False, init=False)
class Prompt:
    """One object to segment: labelled points, a box, an earlier answer's logits, or a mix.

    points: anything `parse_points` accepts; stored as a tuple of `Point`.
    box: (x_min, y_min, x_max, y_max) or any single box `parse_boxes` accepts; stored as a `Box`.
    mask: logits [M, M] or [1, M, M] of an earlier answer; stored as float16 [M, M], read-only.
    class_name, class_id, detection_id: copied to the mask, never sent.

    Raises PromptError if there are no points, no box and no mask, or if one of them is invalid.
    """

    points: tuple[Point, ...]
    box: Box | None
    mask: NDArray[np.float16] | None
    class_name: str
    class_id: int
    detection_id: str | None

    def __init__(
        self,
        points: Any = None,
        box: Any = None,
        mask: NDArray[Any] | None = None,
        *,
        class_name: str = FOREGROUND_CLASS_NAME,
        class_id: int = FOREGROUND_CLASS_ID,
        detection_id: str | None = None,
    ) -> None:
        values: dict[str, Any] = {
            "points": parse_points(points),
            "box": None if box is None else parse_box(box),
            "mask": None if mask is None else parse_mask(mask),
            "class_name": str(class_name),
            "class_id": parse_class_id(class_id),
            "detection_id": None if detection_id is None else str(detection_id),
        }
        if not values["points"] and values["box"] is None and values["mask"] is None:
            raise PromptError("a prompt needs points, a box or a mask, but this one has none")
        for name, value in values.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True, eq=False)
class PackedPrompts:
    """N prompts in wire format; P is the largest number of tokens any of them has.

    point_coords: float32 [N, P, 2], x and y as fractions of the image's width and height.
    point_labels: int32 [N, P], 1 positive, 0 negative, 2 and 3 a box's corners, -1 padding.
    mask_input: float16 [N, M, M], a plane of NaN for a prompt without a mask; None if none has one.
    """

    point_coords: NDArray[np.float32]
    point_labels: NDArray[np.int32]
    mask_input: NDArray[np.float16] | None


def to_prompts(points: Any = None, boxes: Any = None) -> tuple[Prompt, ...]:
    """Return one prompt per box, then one for all the points together.

    Empty boxes without points give no prompts, as a detector may find nothing; passing neither
    points nor boxes raises PromptError.
    """
    parsed_points = parse_points(points)
    prompts = parse_boxes(boxes)
    if boxes is None and not parsed_points:
        raise PromptError("there is nothing to segment: give points, boxes or both")
    return (*prompts, Prompt(points=parsed_points)) if parsed_points else prompts


def parse_boxes(boxes: Any) -> tuple[Prompt, ...]:
    """Parse boxes, one prompt each, with class id, class name and detection id if they have them.

    boxes: None; an array or list [n, 4] of x_min, y_min, x_max, y_max; dicts with those keys
    (also xmin…, x0…y1, x1…y2); `Box.from_xywh` and the like; Roboflow's detections and responses
    {"predictions": […]}; a `supervision.Detections`.
    Raises PromptError quoting the value for NaN, a wrong length, corners in the wrong order, and a
    dict of only x, y, width and height, whose x and y may be a corner or the centre.
    """
    if boxes is None:
        return ()
    while isinstance(boxes, Mapping) and "predictions" in boxes:  # a block's output nests them
        boxes = boxes["predictions"]
    if hasattr(boxes, "xyxy"):
        return _from_detections(boxes)
    return tuple(convert_each(parse_list(boxes, "boxes", BOX_FORMS), "boxes", _parse_box_prompt))


def pack(
    prompts: Sequence[Prompt],
    width: int,
    height: int,
    mask_side: int,
    *,
    max_tokens: int | None = None,
    first: int = 0,
) -> PackedPrompts:
    """Pack prompts for an image of width × height pixels.

    A box's two tokens come before the points; a box that extends beyond the image is clipped to it.
    mask_side: M, the side of the server's mask logits.
    max_tokens: most tokens per object that the server accepts.
    first: the index of the first of these prompts among all, for error messages.
    Raises PromptError for a point or a whole box outside the image, a mask of another size, or too
    many tokens.
    """
    to_tokens = partial(_tokens, width=width, height=height, max_tokens=max_tokens)
    tokens = convert_each(prompts, "objects", to_tokens, first)
    # At least one column of padding: a prompt with only a mask then has the same rank and no
    # zero-length dimension, which not every path of the server accepts.
    columns = max((len(labels) for _, labels in tokens), default=0) or 1
    coords = np.zeros((len(prompts), columns, 2), np.float32)
    labels = np.full((len(prompts), columns), LABEL_PADDING, np.int32)
    for row, (xy, kinds) in enumerate(tokens):
        pixels = np.array(xy, np.float64).reshape(-1, 2)
        coords[row, : len(kinds)] = to_fractions(pixels, width, height)
        labels[row, : len(kinds)] = kinds
    return PackedPrompts(coords, labels, _pack_masks(prompts, mask_side))


def _parse_box_prompt(box: Any) -> Prompt:
    if not isinstance(box, Mapping):
        return Prompt(box=box)
    class_name = box.get("class_name", box.get("class"))
    return _box_prompt(box, class_name, box.get("class_id"), box.get("detection_id"))


def _from_detections(detections: Any) -> tuple[Prompt, ...]:
    """Parse a `supervision.Detections`, or anything with `xyxy`; it need not be installed."""
    boxes = list(detections.xyxy)
    data = getattr(detections, "data", None)
    named = data if isinstance(data, Mapping) else {}  # an array in other libraries
    class_id = getattr(detections, "class_id", None)
    columns = (named.get("class_name"), class_id, named.get("detection_id"))
    rows = [[None] * len(boxes) if column is None else list(column) for column in columns]
    if any(len(row) != len(boxes) for row in rows):
        raise PromptError(
            f"{len(boxes)} boxes need as many class names, class ids and detection ids: give "
            "one of each per box, or none"
        )
    described = list(zip(boxes, *rows, strict=True))
    return tuple(convert_each(described, "boxes", lambda row: _box_prompt(*row)))


def _box_prompt(box: Any, class_name: Any, class_id: Any, detection_id: Any) -> Prompt:
    return Prompt(
        box=box,
        class_name=FOREGROUND_CLASS_NAME if class_name is None else class_name,
        class_id=FOREGROUND_CLASS_ID if class_id is None else class_id,
        detection_id=detection_id,
    )


def _tokens(
    prompt: Prompt, width: int, height: int, max_tokens: int | None
) -> tuple[list[tuple[float, float]], list[int]]:
    xy: list[tuple[float, float]] = []
    labels: list[int] = []
    if prompt.box is not None:
        x_min, y_min, x_max, y_max = _clip(prompt.box, width, height)
        xy += [(x_min, y_min), (x_max, y_max)]
        labels += [LABEL_BOX_TOP_LEFT, LABEL_BOX_BOTTOM_RIGHT]
    for point in prompt.points:
        _check_inside(point, width, height)
        xy.append((point.x, point.y))
        labels.append(LABEL_POSITIVE if point.positive else LABEL_NEGATIVE)
    if max_tokens is not None and len(labels) > max_tokens:
        raise PromptError(
            f"an object has {len(labels)} tokens (1 per point, 2 per box), but this server accepts "
            f"at most {max_tokens}: remove some points"
        )
    return xy, labels


def overlaps(box: Box, width: int, height: int) -> bool:
    """Whether any part of a box is within an image of width × height pixels, or on its border."""
    return box.x_min <= width and box.y_min <= height and box.x_max >= 0 and box.y_max >= 0


def _clip(box: Box, width: int, height: int) -> Box:
    if not overlaps(box, width, height):
        raise PromptError(f"box {tuple(box)} lies entirely outside the {width}×{height} image")
    return Box(
        max(box.x_min, 0.0), max(box.y_min, 0.0), min(box.x_max, width), min(box.y_max, height)
    )


def _check_inside(point: Point, width: int, height: int) -> None:
    if not (0 <= point.x <= width and 0 <= point.y <= height):
        raise PromptError(
            f"point ({point.x}, {point.y}) is outside the image: "
            f"x must be within 0…{width}, y within 0…{height}"
        )


def _pack_masks(prompts: Sequence[Prompt], mask_side: int) -> NDArray[np.float16] | None:
    carried = [prompt.mask for prompt in prompts]
    if all(mask is None for mask in carried):
        return None
    planes = np.full((len(prompts), mask_side, mask_side), np.nan, np.float16)
    for plane, mask in zip(planes, carried, strict=True):
        if mask is None:
            continue
        if mask.shape != plane.shape:
            raise PromptError(
                f"a mask of {mask.shape[0]}×{mask.shape[1]} does not fit this server's masks of "
                f"{mask_side}×{mask_side}: pass the logits of an answer from the same model"
            )
        plane[:] = mask
    return planes
