"""What a request may say about its objects, and the error message if it may not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from prompts import PADDING, InvalidPrompt, Limits, ObjectPrompt, check_objects, parse_prompts
from torch import Tensor

M = 4
LIMITS = Limits(max_objects=3, max_tokens=5, mask_size=M)
POINT, NEGATIVE, TOP_LEFT, BOTTOM_RIGHT = 1, 0, 2, 3


def parse(
    labels: list[list[int]], masks: Tensor | None = None, coords: Any = None
) -> list[ObjectPrompt]:
    """Prompts by their labels; coordinates count up from 0 unless they are given."""
    typed = np.array(labels, np.int32).reshape(len(labels), -1)
    if coords is None:
        coords = np.arange(2 * typed.size).reshape(*typed.shape, 2) / max(1, 2 * typed.size)
    return parse_prompts(np.asarray(coords, np.float32), typed, masks, LIMITS)


def refused(labels: list[list[int]], masks: Tensor | None = None, coords: Any = None) -> str:
    with pytest.raises(InvalidPrompt) as caught:
        parse(labels, masks, coords)
    return str(caught.value)


def test_a_point_gets_the_token_that_sam_adds() -> None:
    (prompt,) = parse([[POINT]], coords=[[[0.25, 0.75]]])
    assert prompt.coords.tolist() == [[0.25, 0.75], [0, 0]]
    np.testing.assert_array_equal(prompt.labels, [POINT, PADDING])
    assert [prompt.coords.dtype.name, prompt.labels.dtype.name] == ["float32", "int32"]
    assert prompt.tokens == 2
    assert prompt.mask is None


def test_a_box_with_points_keeps_its_order() -> None:
    (prompt,) = parse([[TOP_LEFT, BOTTOM_RIGHT, POINT, NEGATIVE]])
    assert prompt.labels.tolist() == [TOP_LEFT, BOTTOM_RIGHT, POINT, NEGATIVE, PADDING]


def test_a_mask_alone_has_no_tokens() -> None:
    (prompt,) = parse([[PADDING]], torch.ones(1, M, M))
    assert prompt.tokens == 0
    assert prompt.coords.shape == (0, 2)
    assert prompt.mask is not None
    assert torch.equal(prompt.mask, torch.ones(M, M))


def test_objects_differ_in_tokens_and_masks() -> None:
    masks = torch.stack([torch.full((M, M), value) for value in (math.nan, 2.0, 3.0)])
    first, second, third = parse([[POINT, POINT], [NEGATIVE, PADDING], [PADDING, PADDING]], masks)
    assert (first.tokens, second.tokens, third.tokens) == (3, 2, 0)
    assert first.mask is None
    assert second.mask is not None
    assert third.mask is not None
    assert [float(prompt[0, 0]) for prompt in (second.mask, third.mask)] == [2, 3]


def test_no_objects_give_no_prompts() -> None:
    assert (
        parse_prompts(np.zeros((0, 3, 2), np.float32), np.zeros((0, 3), np.int32), None, LIMITS)
        == []
    )


@given(
    labels=st.lists(st.sampled_from([POINT, NEGATIVE]), min_size=1, max_size=3),
    gaps=st.lists(st.integers(0, 3), max_size=2),
    garbage=st.sampled_from([0.0, -7.0, 2.0, math.nan, math.inf]),
)
def test_padding_changes_nothing(labels: list[int], gaps: list[int], garbage: float) -> None:
    """Wherever it is, and whatever its coordinates are."""
    (plain,) = parse([labels])
    padded, coords = list(labels), plain.coords[:-1].tolist()
    for gap in gaps:
        padded.insert(gap, PADDING)
        coords.insert(gap, [garbage, garbage])
    (prompt,) = parse([padded], coords=[coords])
    np.testing.assert_array_equal(prompt.coords, plain.coords)
    np.testing.assert_array_equal(prompt.labels, plain.labels)


def _array(*shape: int, dtype: Any = np.float32) -> NDArray[Any]:
    return np.zeros(shape, dtype)


SHAPES = {
    "point_coords has shape [1, 2]; expected [N, P, 2]: N objects of P tokens with x and y": (
        _array(1, 2),
        _array(1, dtype=np.int32),
        None,
    ),
    "point_coords has shape [1, 1, 3]; expected [N, P, 2]: N objects of P tokens with x and y": (
        _array(1, 1, 3),
        _array(1, 1, dtype=np.int32),
        None,
    ),
    "point_labels has shape [2, 1]; expected [1, 1], one label for each pair of point_coords": (
        _array(1, 1, 2),
        _array(2, 1, dtype=np.int32),
        None,
    ),
    "6 tokens per object; at most 5 are accepted (a point is one token, a box two): send fewer "
    "points": (
        _array(1, 6, 2),
        _array(1, 6, dtype=np.int32),
        None,
    ),
    "mask_input has shape [2, 4, 4]; expected [1, 4, 4]: the low_res_masks of an earlier answer, "
    "one for each object": (
        _array(1, 1, 2),
        _array(1, 1, dtype=np.int32),
        torch.zeros(2, M, M),
    ),
    "mask_input has shape [1, 4, 5]; expected [1, 4, 4]: the low_res_masks of an earlier answer, "
    "one for each object": (
        _array(1, 1, 2),
        _array(1, 1, dtype=np.int32),
        torch.zeros(1, M, M + 1),
    ),
}


@pytest.mark.parametrize("sentence", SHAPES)
def test_wrong_shapes_are_rejected(sentence: str) -> None:
    coords, labels, masks = SHAPES[sentence]
    with pytest.raises(InvalidPrompt) as caught:
        parse_prompts(coords, labels, masks, LIMITS)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("label", [-2, 4, 2**31 - 1])
def test_unknown_labels_are_rejected(label: int) -> None:
    assert refused([[POINT, POINT], [POINT, label]]) == (
        f"point_labels[1, 1] is {label}; accepted are 1 (positive point), 0 (negative point), "
        "2 and 3 (a box's top-left and bottom-right corner), -1 (padding)"
    )


@pytest.mark.parametrize("bad", [-0.01, 1.01, math.nan, math.inf, -math.inf])
def test_coordinates_outside_the_image_are_rejected(bad: float) -> None:
    assert refused([[POINT, POINT]], coords=[[[0.5, 0.5], [0.25, bad]]]) == (
        f"point_coords[0, 1] is (0.25, {bad:g}); x and y must be finite fractions of the image's "
        "width and height, from 0 to 1"
    )


def test_the_image_includes_its_edges() -> None:
    (prompt,) = parse([[POINT, POINT]], coords=[[[0, 0], [1, 1]]])
    assert prompt.tokens == 3


@pytest.mark.parametrize(
    ("labels", "first", "second"),
    [
        ([TOP_LEFT, POINT], 1, 0),
        ([BOTTOM_RIGHT, PADDING], 0, 1),
        ([TOP_LEFT, TOP_LEFT, BOTTOM_RIGHT], 2, 1),
        ([TOP_LEFT, BOTTOM_RIGHT] * 2, 2, 2),
    ],
)
def test_half_a_box_is_rejected(labels: list[int], first: int, second: int) -> None:
    assert refused([labels]) == (
        f"object 0 has {first} top-left (label 2) and {second} bottom-right (label 3) box corners; "
        "an object has one box, with both corners, or none"
    )


def test_an_object_without_any_prompt_is_rejected() -> None:
    sentence = "object 1 has neither a point nor a box nor a mask; give it at least one of them"
    assert refused([[POINT], [PADDING]]) == sentence
    no_mask = torch.full((2, M, M), math.nan)
    assert refused([[POINT], [PADDING]], no_mask) == sentence


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_partly_nan_mask_is_rejected(bad: float) -> None:
    masks = torch.zeros(2, M, M)
    masks[1, 2, 3] = bad
    assert refused([[POINT], [POINT]], masks) == (
        "mask_input[1] has NaN or infinite logits; all must be finite, or all NaN if the object "
        "has no mask"
    )


@pytest.mark.parametrize(
    ("images", "objects", "sentence"),
    [(1, 4, "4 objects in one request"), (2, 2, "2 objects in each of 2 images in one request")],
)
def test_a_request_has_a_limit_of_objects_in_all_its_images(
    images: int, objects: int, sentence: str
) -> None:
    for fits in ((1, 3), (3, 1), (9, 0)):
        check_objects(*fits, LIMITS)
    with pytest.raises(InvalidPrompt) as caught:
        check_objects(images, objects, LIMITS)
    assert str(caught.value) == (
        f"{sentence}; at most 3 in all its images are accepted: split the request (keep_image "
        "avoids encoding an image again)"
    )


def test_a_box_has_its_corners_the_right_way_round() -> None:
    """The model takes swapped ones for another box and answers with a mask of something else."""
    upright = [[0.2, 0.3], [0.6, 0.7]]
    for line in ([[0.2, 0.3], [0.2, 0.7]], [[0.2, 0.3], [0.6, 0.3]]):
        assert parse([[TOP_LEFT, BOTTOM_RIGHT]], coords=[line])[0].tokens == 3
    for swapped in ([[0.6, 0.7], [0.2, 0.3]], [[0.6, 0.3], [0.2, 0.7]], [[0.2, 0.7], [0.6, 0.3]]):
        sentence = refused(
            [[POINT, PADDING], [TOP_LEFT, BOTTOM_RIGHT], [TOP_LEFT, BOTTOM_RIGHT]],
            coords=[[[0.9, 0.9], [0, 0]], upright, swapped],
        )
        assert sentence == (
            "the box of object 2 has its corners the wrong way round: label 2 is its top-left "
            "corner, where x and y are smallest, and label 3 its bottom-right one"
        )
    first_label_last = parse([[BOTTOM_RIGHT, TOP_LEFT]], coords=[upright[::-1]])
    assert first_label_last[0].labels.tolist() == [BOTTOM_RIGHT, TOP_LEFT, PADDING]
