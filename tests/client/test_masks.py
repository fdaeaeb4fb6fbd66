"""Finished masks against Meta's post-processing and torch; boxes and areas against NumPy."""

import subprocess
import sys
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from triton_sam3 import masks as masks_module
from triton_sam3.masks import finish_masks, mask_areas, mask_boxes, max_hole_area

SIDE = 288
"""SAM 3's mask grid, where the reference's figure of 256 px holds."""


def clouds(seed: int, count: int, side: int, grain: float) -> NDArray[np.float32]:
    """Smooth random logits with regions, holes and specks of many sizes."""
    noise = np.random.default_rng(seed).standard_normal((count, side, side)).astype(np.float32)
    blurred = np.stack([cv2.GaussianBlur(plane, (0, 0), grain) for plane in noise])
    logits: NDArray[np.float32] = np.clip(blurred / blurred.std() * 8, -32, 32)
    return logits


def speck() -> NDArray[np.float32]:
    """An object smaller than the holes that are filled."""
    y, x = np.mgrid[:SIDE, :SIDE]
    return np.asarray(7.5 - np.hypot(x - 100, y - 61), np.float32)[None]


def finished(
    logits: NDArray[Any], width: int, height: int, limit: float | None
) -> NDArray[np.bool_]:
    """Masks with holes of up to `limit` pixels filled; None is the limit of the served model."""
    with pytest.MonkeyPatch.context() as patch:
        if limit is not None:
            patch.setattr(masks_module, "max_hole_area", lambda _: limit)
        return finish_masks(logits, width, height)


def differing(ours: NDArray[np.bool_], expected: NDArray[np.bool_]) -> float:
    return float((ours != expected).mean())


@pytest.mark.semantic(
    "masks", "logits become masks as Meta's transforms make them", "Meta's predictor"
)
@pytest.mark.parametrize("size", [(640, 480), (333, 517), (1000, 40), (100, 77), (1, 1)])
def test_masks_are_the_same_as_the_references(reference: Any, size: tuple[int, int]) -> None:
    width, height = size
    planes = [*(clouds(1, 1, SIDE, grain) for grain in (3, 9)), speck()]
    logits = np.concatenate(planes).astype(np.float16)
    expected = reference(1008).postprocess_masks(torch.from_numpy(logits)[None], (height, width))
    ours = finish_masks(logits, width, height)
    assert ours.shape == (3, height, width)
    assert ours.dtype == np.bool_
    # Upsampling rounds differently in the last bit, which shows where a logit is 0 to six digits.
    assert differing(ours, (expected[0] > 0).numpy()) < 1e-5


@pytest.mark.semantic(
    "masks", "holes are filled as Meta's transforms fill them", "Meta's predictor"
)
def test_holes_are_filled_as_the_reference_does(reference: Any) -> None:
    logits = np.full((1, SIDE, SIDE), 5, np.float32)
    logits[0, 10:26, 10:26] = -3  # 256 px, filled
    logits[0, 50:66, 50:66] = -3  # 257 px with a diagonal neighbour, kept
    logits[0, 66, 66] = 0
    logits[0, 0:3, 200:203] = -1  # at the border, filled
    expected = reference(1008).postprocess_masks(torch.from_numpy(logits)[None], (SIDE, SIDE))
    ours = finish_masks(logits, SIDE, SIDE)
    np.testing.assert_array_equal(ours, (expected[0] > 0).numpy())
    assert int((~ours).sum()) == 257
    assert int((~finished(logits, SIDE, SIDE, 0)).sum()) == 256 + 257 + 9
    assert finished(logits, SIDE, SIDE, 257).all()


def test_max_hole_area_is_the_same_as_the_references_on_its_grid() -> None:
    assert max_hole_area(SIDE) == 256
    assert max_hole_area(SIDE // 4) == 16


def test_the_input_is_not_modified() -> None:
    logits = clouds(2, 2, 72, 2)
    before = logits.copy()
    finish_masks(logits, 200, 100)
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("size", [(4000, 3000), (288, 288), (144, 144), (577, 90), (17, 1200)])
def test_upsampling_is_the_same_as_torchs(size: tuple[int, int]) -> None:
    width, height = size
    plane = clouds(3, 1, SIDE, 6)
    up = F.interpolate(
        torch.from_numpy(plane)[None], (height, width), mode="bilinear", align_corners=False
    )[0].numpy()
    ours = finished(plane, width, height, 0)
    wrong = ours != (up > 0)
    assert wrong.mean() < 1e-6
    assert np.abs(up[wrong]).max(initial=0) < 1e-4


def test_exactly_zero_is_background() -> None:
    assert not finish_masks(np.zeros((1, 8, 8), np.float32), 30, 20).any()
    assert not finish_masks(np.full((1, 8, 8), -1, np.float16), 30, 20).any()


@settings(max_examples=60)
@given(
    seed=st.integers(0, 999),
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    rows=st.integers(1, 50),
    centre=st.tuples(st.floats(0, 40), st.floats(0, 40)),
)
def test_strips_change_no_pixel(
    seed: int, width: int, height: int, rows: int, centre: tuple[float, float]
) -> None:
    y, x = np.mgrid[:40, :40]
    blob = 6 - np.hypot(x - centre[0], y - centre[1])
    logits = np.concatenate([clouds(seed, 1, 40, 2), blob[None].astype(np.float32)])
    whole = np.stack(
        [two_passes(plane, width, height) > 0 for plane in logits],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks_module, "ROWS_AT_ONCE", rows)
        ours = finished(logits, width, height, 0)
    np.testing.assert_array_equal(ours, whole)


def two_passes(plane: NDArray[np.float32], width: int, height: int) -> NDArray[np.float32]:
    tall = cv2.resize(plane, (plane.shape[1], height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(cv2.resize(tall, (width, height), interpolation=cv2.INTER_LINEAR), np.float32)


def test_objects_do_not_affect_each_other() -> None:
    logits = clouds(4, 5, 96, 3)
    together = finish_masks(logits, 211, 157)
    for plane, mask in zip(logits, together, strict=True):
        np.testing.assert_array_equal(finish_masks(plane[None], 211, 157)[0], mask)


def test_no_objects_give_no_masks() -> None:
    assert finish_masks(np.zeros((0, 8, 8), np.float16), 30, 20).shape == (0, 20, 30)
    assert mask_boxes(np.zeros((0, 20, 30), np.bool_)).shape == (0, 4)
    assert mask_areas(np.zeros((0, 20, 30), np.bool_)).shape == (0,)


@given(hnp.arrays(np.bool_, st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9))))
def test_boxes_and_areas(masks: NDArray[np.bool_]) -> None:
    boxes, areas = mask_boxes(masks), mask_areas(masks)
    assert boxes.dtype == np.float32
    for mask, box, area in zip(masks, boxes, areas, strict=True):
        rows, columns = np.nonzero(mask)
        assert area == len(rows)
        if not area:
            assert not box.any()
            continue
        assert box.tolist() == [
            columns.min(),
            rows.min(),
            columns.max() + 1,
            rows.max() + 1,
        ]


def test_many_small_objects_on_a_large_photo_take_little_memory() -> None:
    """The answer spans 1.2 GB, of which only the rows with an object are ever touched."""
    program = """
import resource
import numpy as np
from triton_sam3.masks import finish_masks, mask_boxes

logits = np.full((100, 288, 288), -8, np.float16)
for number, plane in enumerate(logits):
    plane[2 * number : 2 * number + 20, 50:70] = 8
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
masks = finish_masks(logits, 4000, 3000)
assert mask_boxes(masks)[:, 2].min() > 0
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / masks.nbytes)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert float(run.stdout) < 0.3


def plainly_filled(plane: NDArray[Any], limit: float) -> NDArray[np.float32]:
    """Each hole found and filled by itself, with NumPy's conversion."""
    wide = plane.astype(np.float32)
    count, labels = cv2.connectedComponents((wide <= 0).astype(np.uint8), connectivity=8)
    for label in range(1, count):
        if (labels == label).sum() <= limit:
            wide[labels == label] = masks_module.FILL_LOGIT
    return wide


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    grain=st.sampled_from([0.7, 2, 6, 20]),
    dtype=st.sampled_from([np.float16, np.float32]),
    limit=st.sampled_from([0, 3, 40, 1e9]),
    level=st.floats(-40, 40),
    layout=st.sampled_from(["whole", "strided", "read-only"]),
)
def test_few_and_many_holes_are_filled_as_if_one_by_one(
    seed: int, grain: float, dtype: type, limit: float, level: float, layout: str
) -> None:
    logits: NDArray[Any] = (clouds(seed, 2, 48, grain) + level).astype(dtype)
    logits[0, :3, :3] = np.inf, -np.inf, np.nan
    logits = logits[::-1, ::2, ::2] if layout == "strided" else logits
    logits.flags.writeable = layout != "read-only"
    # At the logits' own size nothing is between two of them.
    size = logits.shape[-1], logits.shape[-2]
    ours = finished(logits, *size, limit)
    expected = np.stack([plainly_filled(plane, limit) > 0 for plane in logits])
    np.testing.assert_array_equal(ours, expected)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    side=st.integers(1, 60),
    grain=st.sampled_from([0.7, 2, 6, 20]),
    dtype=st.sampled_from([np.float16, np.float32]),
    limit=st.sampled_from([None, 0, 3, 1e9]),
    level=st.sampled_from([-40, -4, 0, 4, 40]),
    width=st.integers(1, 200),
    height=st.integers(1, 200),
)
def test_masks_are_the_same_as_filled_one_by_one_and_upsampled_whole(
    seed: int,
    side: int,
    grain: float,
    dtype: type,
    limit: float | None,
    level: float,
    width: int,
    height: int,
) -> None:
    logits: NDArray[Any] = (clouds(seed, 3, side, grain) + level).astype(dtype)
    before = logits.copy()
    ours = finished(logits, width, height, limit)
    area = max_hole_area(side) if limit is None else limit
    filled = [plainly_filled(plane, area) for plane in logits]
    expected = np.stack([two_passes(plane, width, height) > 0 for plane in filled])
    np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("side", [510, 511, 513])
def test_more_regions_than_16_bits_can_number(side: int) -> None:
    logits = np.full((1, side, side), 5, np.float32)
    logits[0, ::2, ::2] = -5  # as many regions as there can be, 65025 or more
    assert finished(logits, side, side, 1).all()
    np.testing.assert_array_equal(finished(logits, side, side, 0), logits > 0)
    logits[0, 300, 301] = -5  # two become one
    filled = finished(logits, side, side, 2)
    assert np.argwhere(~filled[0]).tolist() == [[300, 300], [300, 301], [300, 302]]


def test_float16_is_converted_exactly() -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(256, 256)
    np.testing.assert_array_equal(masks_module._float32(every), every.astype(np.float32))


@pytest.mark.parametrize(("limit", "filled"), [(1799, False), (1800, True)])
def test_holes_that_touch_at_corners_are_one_region_on_large_planes(
    limit: float, filled: bool
) -> None:
    logits = np.ones((1, 600, 600), np.float16)
    logits[0, 100:130, 100:130] = logits[0, 130:160, 130:160] = -1  # 900 px each
    assert finished(logits, 600, 600, limit).all() == filled
