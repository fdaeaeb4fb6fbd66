"""Simulated clicks and boxes."""

from __future__ import annotations

import numpy as np
import pytest

from demo import prompts


@pytest.fixture
def square() -> prompts.Mask:
    mask = np.zeros((20, 30), bool)
    mask[5:14, 10:19] = True
    return mask


def test_the_most_interior_pixel_of_a_square_is_its_centre(square: prompts.Mask) -> None:
    assert prompts.interior(square) == (14.0, 9.0)


def test_the_border_of_the_picture_counts_as_outside() -> None:
    assert prompts.interior(np.ones((9, 9), bool)) == (4.0, 4.0)


def test_any_pixel_lies_in_the_mask(square: prompts.Mask) -> None:
    rng = np.random.default_rng(0)
    picked = {prompts.anywhere(square, rng) for _ in range(200)}
    assert all(square[int(y), int(x)] for x, y in picked)
    assert len(picked) > 50


def test_a_box_is_tight_and_exclusive_at_its_end(square: prompts.Mask) -> None:
    assert prompts.box(square) == (10.0, 5.0, 19.0, 14.0)


def test_missing_pixels_ask_for_a_positive_click(square: prompts.Mask) -> None:
    predicted = square.copy()
    predicted[5:9] = False
    region, missing = prompts.correction(predicted, square)
    assert missing
    assert np.array_equal(region, square & ~predicted)


def test_superfluous_pixels_ask_for_a_negative_click(square: prompts.Mask) -> None:
    predicted = square.copy()
    predicted[0:3, 0:3] = True
    region, missing = prompts.correction(predicted, square)
    assert not missing
    assert region.sum() == 9
    assert region[1, 1]


def test_the_larger_of_two_errors_is_corrected(square: prompts.Mask) -> None:
    predicted = square.copy()
    predicted[5:7] = False
    predicted[0, 0] = True
    region, missing = prompts.correction(predicted, square)
    assert missing
    assert region.sum() == 18


def test_a_perfect_mask_asks_for_a_click_inside(square: prompts.Mask) -> None:
    region, missing = prompts.correction(square, square)
    assert missing
    assert np.array_equal(region, square)


def test_iou_counts_pixels(square: prompts.Mask) -> None:
    assert prompts.iou(square, square) == 1
    assert prompts.iou(square, np.zeros_like(square)) == 0
    half = square.copy()
    half[:, :14] = False
    assert prompts.iou(half, square) == pytest.approx(5 / 9)
