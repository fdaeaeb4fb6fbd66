"""Points, boxes and masks in every spelling, and what is said about those that are wrong."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_sam3.errors import PromptError
from triton_sam3.parsing import (
    Box,
    Point,
    parse_box,
    parse_class_id,
    parse_mask,
    parse_points,
    parse_threshold,
)

A_POINT = "a point is {'x': …, 'y': …, 'positive': …}, (x, y) or (x, y, positive)"
IN_A_LIST = f"wrap a single one in a list: {A_POINT}"
A_BOX = (
    "a box is (x_min, y_min, x_max, y_max), a dict with those keys, Box.from_xywh(…), "
    "Box.from_center(…) or a Roboflow detection, in pixels"
)
IN_ORDER = "x_min must be at most x_max, and y_min at most y_max"

coordinates = st.floats(-1e6, 1e6)
points = st.builds(Point, coordinates, coordinates, st.booleans())


@pytest.mark.semantic(
    "client",
    "points may be dicts, pairs, triples or arrays, of numpy's scalars too",
    "the block's rules",
)
@given(st.lists(points, max_size=5))
def test_every_spelling_of_points_means_the_same(expected: list[Point]) -> None:
    spellings: list[Any] = [
        expected,
        [tuple(point) for point in expected],
        [list(point) for point in expected],
        [point._asdict() for point in expected],
        [(np.float64(x), np.float64(y), np.bool_(positive)) for x, y, positive in expected],
        [(Fraction(x), Fraction(y), int(positive)) for x, y, positive in expected],
        (point for point in expected),
        np.array(expected, np.float64).reshape(-1, 3),
        torch.tensor(expected, dtype=torch.float64).reshape(-1, 3),
    ]
    for spelling in spellings:
        assert parse_points(spelling) == tuple(expected)


def test_points_are_positive_by_default() -> None:
    pairs = np.array([[1, 2], [3, 4]])
    expected = (Point(1, 2, True), Point(3, 4, True))
    assert parse_points(pairs) == expected
    assert parse_points([(1, 2), {"x": 3, "y": 4}]) == expected


def test_other_keys_of_a_point_are_ignored() -> None:
    drawn = {"x": 3, "y": 4, "positive": False, "id": 7}
    assert parse_points([drawn]) == (Point(3, 4, False),)


def test_parsed_points_are_plain_numbers() -> None:
    (point,) = parse_points([(np.float32(1.5), np.int64(2), np.int8(0))])
    assert [type(value) for value in point] == [float, float, bool]


def test_none_gives_no_points() -> None:
    assert parse_points(None) == ()
    assert parse_points(np.zeros((0, 2))) == ()


@pytest.mark.semantic(
    "client",
    "a missing or boolean coordinate or a wrong length is an error that quotes the value",
    "the block's rules",
)
@pytest.mark.parametrize(
    ("given_points", "message"),
    [
        ([{"x": 3}], f"point {{'x': 3}} is missing 'y': {A_POINT}"),
        ([{"positive": True}], f"point {{'positive': True}} is missing 'x', 'y': {A_POINT}"),
        ([(True, 2)], "point (True, 2): coordinates must be numbers, got True"),
        (
            [{"x": np.int64(1), "y": np.bool_(False)}],
            "point {'x': 1, 'y': False}: coordinates must be numbers, got False",
        ),
        ([("7", 2)], "point ('7', 2): coordinates must be numbers, got '7'"),
        ([(1, None)], "point (1, None): coordinates must be numbers, got None"),
        (
            [(1, math.nan)],
            "point (1, nan): coordinates must be within ±1,000,000,000 pixels, got nan",
        ),
        (
            np.array([[np.inf, 1]]),
            "point [inf, 1.0]: coordinates must be within ±1,000,000,000 pixels, got inf",
        ),
        ([(1, 2, "no")], "point (1, 2, 'no'): positive must be true or false, got 'no'"),
        ([(1, 2, 3)], "point (1, 2, 3): positive must be true or false, got 3"),
        ([(1, 2, None)], "point (1, 2, None): positive must be true or false, got None"),
        ([(5,)], f"(5,) is not a point: {A_POINT}"),
        ([(1, 2, 1, 0)], f"(1, 2, 1, 0) is not a point: {A_POINT}"),
        (["ab"], f"'ab' is not a point: {A_POINT}"),
        ((320, 240), f"points must be a list of points, got (320, 240); {IN_A_LIST}"),
        (
            {"x": 1, "y": 2},
            f"points must be a list of points, got {{'x': 1, 'y': 2}}; {IN_A_LIST}",
        ),
        (
            [{"x": 1, "y": 2, "label": 0}],
            "point {'label': 0, 'x': 1, 'y': 2} has the unknown key 'label'; use 'positive'",
        ),
        (
            [{"x": 1, "y": 2, "postive": 0}],
            "point {'postive': 0, 'x': 1, 'y': 2} has the unknown key 'postive'; use 'positive'",
        ),
        (np.array(4), f"points must be a list of points, got 4; {IN_A_LIST}"),
        ("ab", f"points must be a list of points, got 'ab'; {IN_A_LIST}"),
    ],
)
def test_invalid_points_are_quoted(given_points: Any, message: str) -> None:
    with pytest.raises(PromptError) as caught:
        parse_points(given_points)
    assert str(caught.value) == message


@pytest.mark.semantic(
    "client", "boxes may be supervision's, Roboflow's, dicts or arrays", "the block's rules"
)
@pytest.mark.parametrize(
    "spelling",
    [
        (10, 20, 40, 60),
        [10.0, 20.0, 40.0, 60.0],
        np.array([10, 20, 40, 60]),
        torch.tensor([10, 20, 40, 60]),
        {"x_min": 10, "y_min": 20, "x_max": 40, "y_max": 60},
        {"xmin": 10, "ymin": 20, "xmax": 40, "ymax": 60},
        {"x0": 10, "y0": 20, "x1": 40, "y1": 60},
        {"x1": 10, "y1": 20, "x2": 40, "y2": 60},
        Box.from_xywh(10, 20, 30, 40),
        Box.from_center(25, 40, 30, 40),
        *(
            {"x": 25, "y": 40, "width": 30, "height": 40, **more}
            for more in ({"class": "cat"}, {"class_id": 0}, {"confidence": 0.9})
        ),
        {"x": 25, "y": 40, "width": 30, "height": 40, "detection_id": "id"},
    ],
)
def test_every_spelling_of_a_box_means_the_same(spelling: Any) -> None:
    box = parse_box(spelling)
    assert box == Box(10, 20, 40, 60)
    assert all(type(value) is float for value in box)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((9, 1, 5, 4), f"box (9, 1, 5, 4): {IN_ORDER}"),
        (
            {"x": 5, "y": 5, "width": -1, "height": 3, "class_id": 1},
            "box {'class_id': 1, 'height': 3, 'width': -1, 'x': 5, 'y': 5}: width and height must "
            "be 0 or more",
        ),
        (
            np.array([1, 2, np.nan, 4]),
            "box [1.0, 2.0, nan, 4.0]: coordinates must be within ±1,000,000,000 pixels, got nan",
        ),
        ([1, 2, 3, False], "box [1, 2, 3, False]: coordinates must be numbers, got False"),
        (
            np.zeros(4, np.float32),
            "box [0.0, 0.0, 0.0, 0.0] is the box of an empty mask: leave it out, for example with "
            "result[result.areas > 0]",
        ),
        ([1, 2, 3], f"[1, 2, 3] is not a box: {A_BOX}"),
        (7, f"7 is not a box: {A_BOX}"),
        ({"x": 1, "y": 2}, f"box {{'x': 1, 'y': 2}} is missing 'width', 'height': {A_BOX}"),
    ],
)
def test_invalid_boxes_are_quoted(box: Any, message: str) -> None:
    with pytest.raises(PromptError) as caught:
        parse_box(box)
    assert str(caught.value) == message


@pytest.mark.parametrize("more", [{}, {"rotation": 0, "fill": "red"}, {"label": "cat"}])
def test_a_dict_of_x_y_width_and_height_is_ambiguous(more: dict[str, Any]) -> None:
    box = {"x": 10, "y": 20, "width": 30, "height": 40, **more}
    with pytest.raises(PromptError, match=r"does not say what x and y are: pass Box\.from_xywh"):
        parse_box(box)


@pytest.mark.parametrize("make", [Box.from_xywh, Box.from_center])
@pytest.mark.parametrize(
    "values", [(1, 2, -3, 4), (1, 2, 3, "4"), (1, math.nan, 3, 4), (1, 2, 3, None)]
)
def test_a_box_of_an_invalid_size_is_quoted(make: Any, values: Any) -> None:
    with pytest.raises(PromptError, match=rf"^Box\.{make.__name__}\(1, .*\): (width|coordinates)"):
        make(*values)


def test_long_values_are_abbreviated_in_messages() -> None:
    detection = {"x": 1, "points": [{"x": 1.0, "y": 2.0}] * 5000, "note": "n" * 5000}
    with pytest.raises(PromptError, match=r"is missing 'y', 'width', 'height'") as caught:
        parse_box(detection)
    assert len(str(caught.value)) < 700


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(max_size=3)
    | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.tuples(inner, inner)
        | st.dictionaries(st.sampled_from(["x", "y", "positive", "width", "height"]), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=60)
@given(junk)
def test_arbitrary_values_raise_only_prompt_errors(value: Any) -> None:
    for parse in (parse_points, parse_box, parse_class_id, parse_threshold):
        try:
            parse(value)
        except PromptError as error:
            assert str(error)


def test_masks_are_kept_as_read_only_float16() -> None:
    logits = np.random.default_rng(0).standard_normal((1, 9, 9)).astype(np.float32)
    mask = parse_mask(logits)
    assert mask.shape == (9, 9)
    assert mask.dtype == np.float16
    np.testing.assert_array_equal(mask, logits[0].astype(np.float16))
    assert not mask.flags.writeable
    logits[:] = 0
    assert mask.any()


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (np.ones((8, 8), np.bool_), r"logits \[M, M\] of an earlier answer .* got bool \[8, 8\]"),
        (np.ones((8, 9), np.float32), r"got float32 \[8, 9\]"),
        (np.ones((2, 8, 8), np.float32), r"got float32 \[2, 8, 8\]"),
        (np.full((8, 8), np.nan), "must be finite and within float16's range"),
        (np.full((8, 8), 1e6), "must be finite and within float16's range"),
    ],
)
def test_invalid_masks_are_rejected(mask: Any, says: str) -> None:
    with pytest.raises(PromptError, match=says):
        parse_mask(mask)


@pytest.mark.parametrize("layout", ["whole", "strided", "other byte order"])
@pytest.mark.parametrize(
    "bits", [0, 1, 0x3FF, 0x3C00, 0x7800, 0x7BFF, 0x7C00, 0x7C01, 0x7E00, 0xFBFF, 0xFC00, 0xFFFF]
)
def test_exactly_the_finite_float16_values_are_accepted_as_logits(bits: int, layout: str) -> None:
    plane = np.zeros((4, 4), np.uint16)
    plane[2, 2] = bits
    whole = plane.view(np.float16)
    mask = {"whole": whole, "strided": whole[::2, ::2], "other byte order": whole.astype(">f2")}
    if np.isfinite(whole).all():
        assert parse_mask(mask[layout]).tolist() == mask[layout].tolist()
    else:
        with pytest.raises(PromptError, match="must be finite and within float16's range"):
            parse_mask(mask[layout])


@pytest.mark.parametrize("value", [3, 3.0, np.int8(3), np.array(3)])
def test_class_ids(value: Any) -> None:
    assert parse_class_id(value) == 3


@pytest.mark.parametrize("value", [True, "3", 3.5, math.nan, math.inf, None])
def test_invalid_class_ids_are_rejected(value: Any) -> None:
    with pytest.raises(PromptError, match="class_id must be an integer, got "):
        parse_class_id(value)


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, np.uint64(2**63), 1e300])
def test_class_ids_beyond_64_bits_are_rejected(value: Any) -> None:
    with pytest.raises(PromptError, match="class_id must fit in 64 bits, got "):
        parse_class_id(value)


def test_the_invalid_one_of_several_is_named_by_its_index() -> None:
    with pytest.raises(PromptError, match=r"^points\[2\]: "):
        parse_points([(1, 2), (3, 4), (5, "x"), (6,)])
    with pytest.raises(PromptError, match=r"^\(6,\) is not a point"):
        parse_points([(6,)])


class Foreign:
    """A tensor of a type that NumPy does not know, as torch's bfloat16."""

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("Got unsupported ScalarType BFloat16")


@pytest.mark.parametrize("mask", [[[1.0, 2.0], [3.0]], Foreign()])
def test_masks_that_are_not_arrays_are_rejected(mask: Any) -> None:
    with pytest.raises(PromptError, match=r"logits \[M, M\].* cannot be converted to an array: "):
        parse_mask(mask)
