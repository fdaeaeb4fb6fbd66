"""Boolean masks in the formats other programs read.

bool [H, W] ─► polygons      rings through the centres of the outermost pixels, with holes
            ─► PNG           0 and 255, as a file's bytes
            ─► COCO RLE      {"size": [H, W], "counts": str}, lossless
            ─► Roboflow      one prediction of its instance-segmentation JSON
            ─► index mask    one image, each pixel the index of its object
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

MIN_VERTICES = 3
"""Vertices that Roboflow's readers require of a polygon; shorter rings repeat their last vertex."""


@dataclass(frozen=True, eq=False)
class Polygon:
    """One connected region of a mask.

    outer: int32 [K, 2], x and y of the vertices in pixels, through the region's own edge pixels.
    holes: rings like `outer`, through the region's pixels around each hole.
    """

    outer: NDArray[np.int32]
    holes: tuple[NDArray[np.int32], ...] = ()

    def simplified(self, tolerance: float) -> Polygon:
        """Drop vertices whose removal moves no outline by more than `tolerance` pixels.

        Holes left with fewer than three vertices are dropped as well. Raises ValueError for a
        tolerance that is negative or not finite.
        """
        if not 0 <= tolerance < np.inf:
            raise ValueError(
                f"tolerance must be a finite number of pixels, 0 or more, got {tolerance!r}"
            )
        outer, *holes = (_simplify(ring, tolerance) for ring in (self.outer, *self.holes))
        return Polygon(outer, tuple(ring for ring in holes if len(ring) >= MIN_VERTICES))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, ready for JSON: {"outer": [[x, y], …], "holes": [[[x, y], …], …]}."""
        return {"outer": self.outer.tolist(), "holes": [ring.tolist() for ring in self.holes]}


def _simplify(ring: NDArray[np.int32], tolerance: float) -> NDArray[np.int32]:
    return np.asarray(cv2.approxPolyDP(ring, tolerance, closed=True)[:, 0], np.int32)


def mask_to_png(mask: NDArray[np.bool_]) -> bytes:
    """Encode a mask [H, W] as a grey PNG of 0 and 255."""
    _, encoded = cv2.imencode(".png", mask.view(np.uint8) * 255)
    return bytes(encoded)


def mask_to_polygons(mask: NDArray[np.bool_]) -> tuple[Polygon, ...]:
    """Trace the regions of a mask [H, W] (8-connected), the largest outline first."""
    x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
    if not width:
        return ()
    window = mask[y : y + height, x : x + width].view(np.uint8)
    rings, tree = cv2.findContours(window, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE, offset=(x, y))
    vertices = [np.asarray(ring[:, 0], np.int32) for ring in rings]
    holes: dict[int, list[NDArray[np.int32]]] = {}
    for ring, (_, _, _, parent) in zip(vertices, tree[0], strict=True):
        holes.setdefault(int(parent), []).append(ring)
    outers = [index for index, links in enumerate(tree[0]) if links[3] < 0]
    outers.sort(key=lambda index: -cv2.contourArea(rings[index]))
    return tuple(Polygon(vertices[index], tuple(holes.get(index, ()))) for index in outers)


def mask_to_rle(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Encode a mask [H, W] as COCO's compressed RLE, with counts as str for JSON."""
    x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
    # COCO counts down columns. Transposing only the bounding box, with OpenCV, is many times faster
    # than numpy.asfortranarray on the whole mask.
    columns = np.zeros(mask.shape[::-1], np.uint8)
    if width:
        window = mask[y : y + height, x : x + width].view(np.uint8)
        columns[x : x + width, y : y + height] = cv2.transpose(window)
    rle = coco_mask.encode(columns.T)
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def to_roboflow_ring(polygons: Sequence[Polygon]) -> list[dict[str, float]]:
    """Outline the largest region, as Roboflow's `points` holds only one ring."""
    ring = [{"x": float(x), "y": float(y)} for x, y in polygons[0].outer]
    return ring + ring[-1:] * (MIN_VERTICES - len(ring))


def index_mask(
    masks: NDArray[np.bool_], scores: NDArray[np.floating[Any]]
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """One image [H, W]: 0 for background, i + 1 for mask i; in overlaps, the best score wins.

    uint8 for up to 255 masks, uint16 beyond.
    """
    small = len(masks) <= np.iinfo(np.uint8).max
    indices: Any = np.zeros(masks.shape[1:], np.uint8 if small else np.uint16)
    for index in np.argsort(scores, kind="stable"):
        indices[masks[index]] = index + 1
    return indices  # type: ignore[no-any-return]
