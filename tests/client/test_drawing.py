"""What an overlay changes, and what it leaves alone."""

import numpy as np
import pytest
from numpy.typing import NDArray

from triton_sam3.drawing import NEGATIVE_COLOUR, POSITIVE_COLOUR, colour, overlay
from triton_sam3.prompts import Prompt


@pytest.fixture
def image() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)


def block(top: int, left: int, side: int) -> NDArray[np.bool_]:
    mask = np.zeros((120, 160), np.bool_)
    mask[top : top + side, left : left + side] = True
    return mask


@pytest.mark.parametrize("opacity", [0.0, 0.25, 0.5, 1.0])
def test_masks_are_blended_into_a_copy(image: NDArray[np.uint8], opacity: float) -> None:
    before = image.copy()
    drawn = overlay(image, block(30, 40, 50)[None], opacity=opacity)
    np.testing.assert_array_equal(image, before)
    inner = np.s_[33:77, 43:87]  # within the outline
    expected = image[inner] * (1 - opacity) + np.array(colour(0)) * opacity
    assert np.abs(drawn[inner] - expected).max() <= 1
    untouched = np.ones(image.shape[:2], np.bool_)
    untouched[25:85, 35:95] = False
    np.testing.assert_array_equal(drawn[untouched], image[untouched])


def test_outlines_stay_visible_under_later_masks(image: NDArray[np.uint8]) -> None:
    drawn = overlay(image, np.stack([block(30, 40, 40), block(10, 20, 100)]))
    line = drawn[30, 45:75].astype(int)  # smoothed, so not quite the colour itself
    assert np.abs(line - colour(0)).max() < 60


def test_empty_masks_and_no_masks_change_nothing(image: NDArray[np.uint8]) -> None:
    empty = np.zeros((2, 120, 160), np.bool_)
    np.testing.assert_array_equal(overlay(image, empty), image)
    np.testing.assert_array_equal(overlay(image, empty[:0]), image)


def test_prompts_are_drawn(image: NDArray[np.uint8]) -> None:
    prompt = Prompt(points=[(20, 30), (100, 90, False)], box=(60, 10, 150, 60))
    drawn = overlay(image, np.zeros((0, 120, 160), np.bool_), [prompt])
    assert tuple(drawn[30, 20]) == POSITIVE_COLOUR
    assert tuple(drawn[90, 100]) == NEGATIVE_COLOUR
    assert len(np.unique(drawn[10, 65:145], axis=0)) == 1
    np.testing.assert_array_equal(drawn[20:50, 70:140], image[20:50, 70:140])


def test_neighbouring_objects_differ_in_colour() -> None:
    colours = np.array([colour(index) for index in range(12)], np.int64)
    distances = np.abs(colours[:, None] - colours[None]).sum(axis=2)
    assert distances[~np.eye(12, dtype=np.bool_)].min() > 40
