"""Parse the points, boxes and masks that callers pass, and say what is wrong with them.

    {"x", "y", "positive"} │ (x, y) │ (x, y, positive)            ─► Point
    (x_min, y_min, x_max, y_max) │ a dict of corners │ a detection ─► Box
    logits [M, M]                                                 ─► float16 [M, M]

Python numbers and lists, NumPy arrays and scalars, and other arrays with `tolist` are accepted.
Errors quote the value.
"""

from __future__ import annotations

import math
import numbers
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from .errors import PromptError

T = TypeVar("T")

POINT_FORMS = "a point is {'x': …, 'y': …, 'positive': …}, (x, y) or (x, y, positive)"
BOX_FORMS = (
    "a box is (x_min, y_min, x_max, y_max), a dict with those keys, Box.from_xywh(…), "
    "Box.from_center(…) or a Roboflow detection, in pixels"
)

CORNER_KEYS = (
    ("x_min", "y_min", "x_max", "y_max"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("x0", "y0", "x1", "y1"),
    ("x1", "y1", "x2", "y2"),
)
"""Spellings of a box's corners in dicts, tried in this order."""
SIZE_KEYS = ("x", "y", "width", "height")
DETECTION_KEYS = {"class", "class_id", "confidence", "detection_id"}
"""Any of these marks a Roboflow detection, whose x and y are the centre. In drawing tools they are
the top-left corner."""

MAX_COORDINATE = 1e9
"""Pixels. No image is this wide: a larger coordinate is a mistake."""

FLOAT16_EXPONENT = 0x7C00
"""The exponent bits of a float16; all of them are set only in infinities and NaN."""


class Point(NamedTuple):
    """A labelled point in absolute pixels; `positive` is false for a point outside the object."""

    x: float
    y: float
    positive: bool = True


class Box(NamedTuple):
    """A box in absolute pixels, x_min ≤ x_max and y_min ≤ y_max."""

    x_min: float
    y_min: float
    x_max: float
    y_max: float

    @classmethod
    def from_xywh(cls, x: float, y: float, width: float, height: float) -> Box:
        """A box from its top-left corner and its size in pixels, as in COCO and drawing tools.

        Raises PromptError for a coordinate that is not a finite number, and for a negative size.
        """
        values = (x, y, width, height)
        return _sized_box(values, 0.0, f"Box.from_xywh{quote(values)}")

    @classmethod
    def from_center(cls, x: float, y: float, width: float, height: float) -> Box:
        """A box from its centre and its size in pixels; otherwise like `from_xywh`."""
        values = (x, y, width, height)
        return _sized_box(values, 0.5, f"Box.from_center{quote(values)}")


def _sized_box(values: Sequence[Any], anchor: float, name: str) -> Box:
    """A box around x and y, which lie at the fraction `anchor` of its width and height."""
    x, y, width, height = (_coordinate(value, name) for value in values)
    if width < 0 or height < 0:
        raise PromptError(f"{name}: width and height must be 0 or more")
    before, after = anchor, 1 - anchor
    return Box(x - before * width, y - before * height, x + after * width, y + after * height)


def parse_points(points: Any) -> tuple[Point, ...]:
    """Parse the labelled points of one object.

    points: None, or a sequence whose items are {"x", "y", "positive"} (positive defaults to true),
    (x, y) or (x, y, positive), or an array [n, 2] or [n, 3]. Raises PromptError quoting the value
    for a missing, boolean, NaN or infinite coordinate, for a wrong length, and for a dict that has
    other keys in place of "positive".
    """
    if points is None:
        return ()
    return tuple(convert_each(parse_list(points, "points", POINT_FORMS), "points", _parse_point))


def _parse_point(point: Any) -> Point:
    name = f"point {quote(point)}"
    if isinstance(point, Mapping):
        _require(point, ("x", "y"), name, POINT_FORMS)
        unknown = [quote(key) for key in point if key not in ("x", "y", "positive")]
        if unknown and "positive" not in point:  # `label`, for one, could mean anything
            keys = f"key{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}"
            raise PromptError(f"{name} has the unknown {keys}; use 'positive'")
        parts = [point["x"], point["y"], point.get("positive", True)]
    else:
        parts = _items(point) or []
        if len(parts) not in (2, 3):
            raise PromptError(f"{quote(point)} is not a point: {POINT_FORMS}")
    x, y = (_coordinate(value, name) for value in parts[:2])
    return Point(x, y, parse_bool(parts[2], f"{name}: positive") if len(parts) == 3 else True)


def parse_bool(value: Any, name: str) -> bool:
    """Parse True or 1, False or 0; anything else is more likely a mistake than a yes."""
    native = _native(value)
    if isinstance(native, (bool, int, float)) and native in (0, 1):
        return bool(native)
    raise PromptError(f"{name} must be true or false, got {quote(value)}")


def parse_threshold(value: Any) -> float:
    """Parse the minimum score of a mask; NaN would silently drop every mask."""
    native = _native(value)
    threshold = math.nan
    if isinstance(native, numbers.Real) and not isinstance(native, bool):
        with suppress(OverflowError):  # an integer of hundreds of digits
            threshold = float(native)
    if math.isnan(threshold):
        raise PromptError(f"threshold must be a number, got {quote(value)}")
    return threshold


def parse_box(box: Any) -> Box:
    """Parse one box: (x_min, y_min, x_max, y_max), a dict of those, or a Roboflow detection.

    A box may be a line or a point, because detectors round small ones, but not four zeros, which is
    the box of an empty mask. Raises PromptError quoting the value, also for NaN, a wrong length,
    corners in the wrong order, and a dict of x, y, width and height in which x and y may be a
    corner or the centre.
    """
    name = f"box {quote(box)}"
    if isinstance(box, Mapping):
        corners = _corners_of_mapping(box, name)
    else:
        corners = [_coordinate(value, name) for value in _items(box) or []]
        if len(corners) != 4:
            raise PromptError(f"{quote(box)} is not a box: {BOX_FORMS}")
    parsed = Box(*corners)
    if parsed.x_min > parsed.x_max or parsed.y_min > parsed.y_max:
        raise PromptError(f"{name}: x_min must be at most x_max, and y_min at most y_max")
    if not any(parsed):
        raise PromptError(
            f"{name} is the box of an empty mask: leave it out, for example with "
            "result[result.areas > 0]"
        )
    return parsed


def _corners_of_mapping(box: Mapping[str, Any], name: str) -> list[float]:
    for keys in CORNER_KEYS:
        if all(key in box for key in keys):
            return [_coordinate(box[key], name) for key in keys]
    _require(box, SIZE_KEYS, name, BOX_FORMS)
    values = [box[key] for key in SIZE_KEYS]
    if not DETECTION_KEYS & box.keys():
        raise PromptError(
            f"{name} does not say what x and y are: pass Box.from_xywh(x, y, width, height) if "
            "they are the top-left corner, or Box.from_center(…) if they are the centre, as in "
            "Roboflow's detections, which have a 'class' or a 'confidence'"
        )
    return list(_sized_box(values, 0.5, name))


def parse_mask(mask: Any) -> NDArray[np.float16]:
    """Parse the logits of an earlier answer, [M, M] or [1, M, M], into read-only float16."""
    logits = _as_array(mask)
    if logits.ndim == 3 and logits.shape[0] == 1:
        logits = logits[0]
    if logits.ndim != 2 or logits.shape[0] != logits.shape[1] or logits.dtype.kind != "f":
        raise PromptError(
            "a mask must be the logits [M, M] of an earlier answer as floating-point numbers, "
            f"got {logits.dtype} {list(logits.shape)}"
        )
    if not _fits_float16(logits):
        raise PromptError(
            "a mask's logits must be finite and within float16's range, ±65504; these are not"
        )
    kept = logits.astype(np.float16)
    kept.flags.writeable = False
    return kept


def _fits_float16(logits: NDArray[np.floating[Any]]) -> bool:
    """NaN has a meaning of its own on the wire, and float16 ends at 65504."""
    if logits.dtype == np.float16:
        # Tests the exponent bits: comparing 288 × 288 values takes NumPy 170 µs, this 15 µs.
        exponents = logits.view(np.uint16) & FLOAT16_EXPONENT
        return bool((exponents != FLOAT16_EXPONENT).all())
    return bool((np.abs(logits) <= np.finfo(np.float16).max).all())


def _as_array(mask: Any) -> NDArray[Any]:
    try:
        return np.asarray(mask)
    except Exception as error:  # ragged lists, and tensors that NumPy cannot convert
        raise PromptError(
            "a mask must be the logits [M, M] of an earlier answer, but this "
            f"{type(mask).__name__} cannot be converted to an array: {error}"
        ) from error


def parse_class_id(class_id: Any) -> int:
    """Parse a class id, an integer of any numeric type, of at most 64 bits."""
    native = _native(class_id)
    if isinstance(native, bool) or not isinstance(native, (int, float)) or native % 1 != 0:
        raise PromptError(f"class_id must be an integer, got {quote(class_id)}")
    if not -(2**63) <= native < 2**63:
        raise PromptError(f"class_id must fit in 64 bits, got {quote(class_id)}")
    return int(native)


def parse_list(values: Any, what: str, forms: str) -> list[Any]:
    """Return the items of a list of `what`; raise PromptError for anything else.

    A flat list of numbers is rejected: (320, 240) is one point, not two.
    """
    items = _items(values)
    if items is None or any(isinstance(item, numbers.Number) for item in items):
        raise PromptError(
            f"{what} must be a list of {what}, got {quote(values)}; wrap a single one in a list: "
            f"{forms}"
        )
    return items


def convert_each(
    items: Sequence[Any], what: str, convert: Callable[[Any], T], first: int = 0
) -> list[T]:
    """Convert each item; if there are several, an error names the invalid one by its index.

    first: the index of the first item, if these are not all.
    """
    values = []
    for index, item in enumerate(items, first):
        try:
            values.append(convert(item))
        except PromptError as error:
            if not first and len(items) == 1:
                raise
            raise PromptError(f"{what}[{index}]: {error}") from error
    return values


def quote(value: Any) -> str:
    """A short `repr` for messages, with NumPy values as plain numbers and lists."""
    return _SHORT_REPR.repr(value)


class _ShortRepr(reprlib.Repr):
    """Abbreviates long values: a detection may carry a polygon of thousands of points."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = 5
        self.maxdict = 8
        self.maxstring = self.maxother = 80

    def repr1(self, value: Any, level: int) -> str:
        return super().repr1(_native(value), level)


_SHORT_REPR = _ShortRepr()


def _native(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _items(value: Any) -> list[Any] | None:
    """Return the items of any iterable; None for text, mappings and single values."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        return None
    return None if getattr(value, "ndim", 1) == 0 else list(value)


def _require(mapping: Mapping[str, Any], keys: tuple[str, ...], name: str, forms: str) -> None:
    missing = [key for key in keys if key not in mapping]
    if missing:
        raise PromptError(f"{name} is missing {', '.join(map(repr, missing))}: {forms}")


def _coordinate(value: Any, name: str) -> float:
    native = _native(value)
    if isinstance(native, bool) or not isinstance(native, numbers.Real):
        raise PromptError(f"{name}: coordinates must be numbers, got {quote(value)}")
    try:
        number = float(native)
    except OverflowError:
        number = math.inf
    if not abs(number) <= MAX_COORDINATE:  # false for NaN too
        raise PromptError(
            f"{name}: coordinates must be within ±{MAX_COORDINATE:,.0f} pixels, got {quote(value)}"
        )
    return number
