"""Polygons, RLE and index masks against independent readers of the same formats."""

import io
import json
from typing import Any

import cv2
import numpy as np
import pytest
import supervision as sv
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from skimage.measure import label

from triton_sam3.formats import (
    Polygon,
    index_mask,
    mask_to_png,
    mask_to_polygons,
    mask_to_rle,
    to_roboflow_ring,
)

FOUR, EIGHT = 1, 2
"""Neighbours that count as connected, in scikit-image's terms."""

any_mask = hnp.arrays(np.bool_, st.tuples(st.integers(1, 12), st.integers(1, 12)))


def ring_with_island() -> NDArray[np.bool_]:
    """A square ring, and within its hole another region."""
    mask = np.zeros((40, 50), np.bool_)
    mask[4:34, 6:44] = True
    mask[10:28, 12:38] = False
    mask[16:22, 20:30] = True
    return mask


def polygons_to_mask(polygons: tuple[Polygon, ...], width: int, height: int) -> NDArray[np.bool_]:
    canvas = np.zeros((height, width), np.uint8)
    for polygon in polygons:
        # Even-odd filling paints every ring's own pixels, which belong to the region.
        cv2.fillPoly(canvas, [polygon.outer, *polygon.holes], 1)
    return canvas.view(np.bool_)


@pytest.mark.semantic(
    "results", "polygons with holes draw back to the mask", "the format's own reader"
)
@given(any_mask)
def test_drawing_the_polygons_gives_the_mask_again(mask: NDArray[np.bool_]) -> None:
    height, width = mask.shape
    np.testing.assert_array_equal(polygons_to_mask(mask_to_polygons(mask), width, height), mask)


def test_drawing_the_polygons_of_smooth_shapes_gives_the_mask_again() -> None:
    noise = np.random.default_rng(0).standard_normal((211, 307)).astype(np.float32)
    mask = cv2.GaussianBlur(noise, (0, 0), 4) > 0
    np.testing.assert_array_equal(polygons_to_mask(mask_to_polygons(mask), 307, 211), mask)


@given(any_mask)
def test_each_region_is_a_polygon_and_each_hole_a_ring(mask: NDArray[np.bool_]) -> None:
    polygons = mask_to_polygons(mask)
    assert len(polygons) == label(mask, connectivity=EIGHT).max()
    background = label(np.pad(~mask, 1, constant_values=True), connectivity=FOUR).max()
    assert sum(len(polygon.holes) for polygon in polygons) == background - 1


def test_holes_belong_to_the_region_around_them() -> None:
    outer, island = mask_to_polygons(ring_with_island())
    assert cv2.boundingRect(outer.outer) == (6, 4, 38, 30)
    assert [cv2.boundingRect(hole) for hole in outer.holes] == [(11, 9, 28, 20)]
    assert cv2.boundingRect(island.outer) == (20, 16, 10, 6)
    assert island.holes == ()
    assert outer.outer.dtype == np.int32


def test_an_empty_mask_has_no_polygons() -> None:
    assert mask_to_polygons(np.zeros((5, 6), np.bool_)) == ()
    assert not polygons_to_mask((), 6, 5).any()


@given(any_mask)
def test_rle_is_the_same_as_cocos(mask: NDArray[np.bool_]) -> None:
    rle = mask_to_rle(mask)
    assert rle == {
        **coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))),
        "size": list(mask.shape),
        "counts": rle["counts"],
    }
    assert isinstance(rle["counts"], str)
    np.testing.assert_array_equal(coco_mask.decode(rle).astype(np.bool_), mask)


def test_rle_is_read_by_supervision() -> None:
    mask = ring_with_island()
    height, width = mask.shape
    np.testing.assert_array_equal(
        sv.rle_to_mask(mask_to_rle(mask)["counts"], (width, height)), mask
    )


@pytest.mark.parametrize(
    ("pixels", "ring"),
    [
        ([(3, 2)], [(3, 2)] * 3),
        ([(3, 2), (3, 3)], [(3, 2), (3, 3), (3, 3)]),
    ],
)
def test_rings_have_at_least_three_vertices(pixels: list[Any], ring: list[Any]) -> None:
    mask = np.zeros((6, 7), np.bool_)
    for x, y in pixels:
        mask[y, x] = True
    vertices = to_roboflow_ring(mask_to_polygons(mask))
    assert [(vertex["x"], vertex["y"]) for vertex in vertices] == ring
    assert all(type(value) is float for vertex in vertices for value in vertex.values())


def test_the_largest_region_is_the_ring() -> None:
    mask = np.zeros((30, 30), np.bool_)
    mask[1:4, 1:4] = mask[8:28, 5:29] = True
    ring = to_roboflow_ring(mask_to_polygons(mask))
    assert {(v["x"], v["y"]) for v in ring} == {(5, 8), (5, 27), (28, 27), (28, 8)}


def test_index_masks_show_the_best_score() -> None:
    masks = np.zeros((3, 4, 6), np.bool_)
    masks[0, :, :3] = masks[1, :, 2:5] = masks[2, 1] = True
    indices = index_mask(masks, np.array([0.5, 0.9, 0.7]))
    assert indices.dtype == np.uint8
    assert indices.tolist() == [[1, 1, 2, 2, 2, 0], [3, 3, 2, 2, 2, 3], *[[1, 1, 2, 2, 2, 0]] * 2]


def test_index_masks_of_many_objects() -> None:
    masks = np.eye(300, dtype=np.bool_)[:, None]
    indices = index_mask(masks, np.ones(300))
    assert indices.dtype == np.uint16
    np.testing.assert_array_equal(indices[0], np.arange(1, 301))


def test_polygons_are_values() -> None:
    with pytest.raises(AttributeError):
        Polygon(np.zeros((3, 2), np.int32)).holes = ()  # type: ignore[misc]


@pytest.mark.parametrize(("count", "dtype"), [(255, np.uint8), (256, np.uint16)])
def test_no_mask_has_the_index_of_the_background(count: int, dtype: type) -> None:
    masks = np.eye(count, dtype=np.bool_)[:, np.newaxis]
    indices = index_mask(masks, np.ones(count))
    assert indices.dtype == dtype
    assert indices[0].tolist() == list(range(1, count + 1))


@given(any_mask)
def test_a_png_is_read_by_pillow_as_black_and_white(mask: NDArray[np.bool_]) -> None:
    with Image.open(io.BytesIO(mask_to_png(mask))) as image:
        assert (image.format, image.mode) == ("PNG", "L")
        np.testing.assert_array_equal(np.asarray(image), np.where(mask, 255, 0))


def test_polygons_survive_json() -> None:
    polygons = mask_to_polygons(ring_with_island())
    read = json.loads(json.dumps([polygon.to_dict() for polygon in polygons]))
    again = tuple(
        Polygon(np.array(p["outer"], np.int32), tuple(np.array(h, np.int32) for h in p["holes"]))
        for p in read
    )
    np.testing.assert_array_equal(polygons_to_mask(again, 50, 40), ring_with_island())


@pytest.mark.parametrize("tolerance", [0.5, 1.0, 3.0])
def test_a_simplified_outline_stays_within_the_tolerance(tolerance: float) -> None:
    noise = np.random.default_rng(0).standard_normal((211, 307)).astype(np.float32)
    before = mask_to_polygons(cv2.GaussianBlur(noise, (0, 0), 4) > 0)
    after = [polygon.simplified(tolerance) for polygon in before]
    for traced, fewer in zip(before, after, strict=True):
        ring: Any = fewer.outer
        distances = [-cv2.pointPolygonTest(ring, (int(x), int(y)), True) for x, y in traced.outer]
        assert np.abs(distances).max() <= tolerance + 1e-6
    assert sum(len(p.outer) for p in after) < 0.8 * sum(len(p.outer) for p in before)


def test_a_hole_simplified_to_nothing_is_dropped() -> None:
    (outer, _) = mask_to_polygons(ring_with_island())
    assert (len(outer.simplified(1.0).holes), len(outer.simplified(100.0).holes)) == (1, 0)
    assert len(outer.simplified(100.0).outer) > 0


@pytest.mark.parametrize("tolerance", [-1, float("nan"), float("inf")])
def test_an_invalid_tolerance_is_rejected(tolerance: float) -> None:
    with pytest.raises(ValueError, match="tolerance must be a finite number of pixels"):
        mask_to_polygons(ring_with_island())[0].simplified(tolerance)
