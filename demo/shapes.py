"""Outlines of generated objects: every function fills one shape into an alpha map.

A shape is defined in its own frame (centre 0, 0; about 1 from the centre to the rim), rotated,
squeezed and scaled into the picture by `Pose`, and filled with antialiased edges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
Alpha = NDArray[np.float32]

SUBPIXEL_BITS = 4
"""Fractional bits of the fixed-point coordinates with which OpenCV fills polygons."""


@dataclass(frozen=True)
class Pose:
    """Where a shape lies: centre and radius in pixels, squeeze of its own y axis, angle in rad."""

    x: float
    y: float
    radius: float
    squeeze: float
    angle: float

    def place(self, points: Points) -> Points:
        """Map [K, 2] points of the shape's frame to pixels."""
        c, s = np.cos(self.angle), np.sin(self.angle)
        turned = points * (self.radius, self.radius * self.squeeze) @ np.array([[c, s], [-s, c]])
        return np.asarray(turned + np.array([self.x, self.y]))


def fill(outlines: list[Points], size: int) -> Alpha:
    """Fill outlines (pixels; a second one inside the first is a hole): float32 [S, S] in [0, 1]."""
    canvas = np.zeros((size, size), np.uint8)
    fixed = [np.round(points * 2**SUBPIXEL_BITS).astype(np.int32) for points in outlines]
    cv2.fillPoly(canvas, fixed, 255, cv2.LINE_AA, SUBPIXEL_BITS)
    return canvas.astype(np.float32) / 255


def draw(kind: str, pose: Pose, rng: np.random.Generator, size: int) -> Alpha:
    """Fill a random shape of one of `KINDS` or of `LETTERS` into float32 [S, S] in [0, 1]."""
    if kind == LETTERS:
        return _letter(pose, rng, size)
    return fill([pose.place(outline) for outline in KINDS[kind](rng)], size)


def _circle(steps: int = 48) -> Points:
    angles = np.linspace(0, 2 * np.pi, steps, endpoint=False)
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def _ellipse(_: np.random.Generator) -> list[Points]:
    return [_circle()]


def _rectangle(_: np.random.Generator) -> list[Points]:
    return [np.array([[-1.0, -1], [1, -1], [1, 1], [-1, 1]])]


def _rounded(rng: np.random.Generator) -> list[Points]:
    """A superellipse: between an ellipse and a rectangle."""
    circle = _circle()
    power = rng.uniform(0.25, 0.8)
    return [np.sign(circle) * np.abs(circle) ** power]


def _polygon(rng: np.random.Generator) -> list[Points]:
    corners = rng.integers(3, 8)
    angles = np.sort(np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) * 2 * np.pi / corners
    radii = rng.uniform(0.75, 1.1, corners)
    return [np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None]]


def _star(rng: np.random.Generator) -> list[Points]:
    tips = rng.integers(4, 9)
    angles = np.arange(2 * tips) * np.pi / tips
    radii = np.where(np.arange(2 * tips) % 2, rng.uniform(0.4, 0.7), 1.15)
    return [np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None]]


def _blob(rng: np.random.Generator) -> list[Points]:
    """A closed curve whose radius is a short random Fourier series."""
    angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    waves = np.arange(2, 7)
    heights = rng.normal(0, 0.32, waves.size) / waves
    radii = 1 + (heights * np.cos(angles[:, None] * waves + rng.uniform(0, 6.28, waves.size))).sum(
        1
    )
    return [_circle(72) * np.clip(radii, 0.35, 1.7)[:, None]]


def _ring(rng: np.random.Generator) -> list[Points]:
    return [_circle(), _circle() * rng.uniform(0.35, 0.65)]


def _crescent(rng: np.random.Generator) -> list[Points]:
    angles = np.linspace(0.25 * np.pi, 1.75 * np.pi, 40)
    outer = np.stack([np.cos(angles), np.sin(angles)], 1)
    inner = outer[::-1] * (rng.uniform(0.45, 0.75), 0.8) + (rng.uniform(0.05, 0.2), 0)
    return [np.concatenate([outer, inner])]


def _bar(rng: np.random.Generator) -> list[Points]:
    """A bent bar with round ends, such as a spoon's handle or a leg."""
    t = np.linspace(-1, 1, 24)
    bend = rng.uniform(-0.5, 0.5)
    half = rng.uniform(0.14, 0.3) * np.sqrt(np.clip(1 - t**8, 0, 1))
    taper = 1 + rng.uniform(-0.4, 0.4) * t
    upper = np.stack([1.4 * t, bend * t**2 + half * taper], 1)
    lower = np.stack([1.4 * t, bend * t**2 - half * taper], 1)
    return [np.concatenate([upper, lower[::-1]])]


def _letter(pose: Pose, rng: np.random.Generator, size: int) -> Alpha:
    """A thick letter or digit, drawn large and warped into place."""
    side = 96
    glyph = np.zeros((side, side), np.uint8)
    text = str(rng.choice(list("ABCDEFGHJKLMNPRSTUVXZ2345679")))
    font = int(rng.choice([cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_DUPLEX]))
    thickness = int(rng.integers(11, 17))
    (width, height), _ = cv2.getTextSize(text, font, 2.3, thickness)
    corner = ((side - width) // 2, (side + height) // 2)
    cv2.putText(glyph, text, corner, font, 2.3, 255, thickness, cv2.LINE_AA)
    frame = np.array([[-1.5, -1.5], [1.5, -1.5], [-1.5, 1.5]])
    source = np.array([[0, 0], [side, 0], [0, side]], np.float32)
    matrix = cv2.getAffineTransform(source, pose.place(frame).astype(np.float32))
    warped = cv2.warpAffine(glyph, matrix, (size, size), flags=cv2.INTER_AREA)
    return np.asarray(warped, np.float32) / 255


KINDS: dict[str, Callable[[np.random.Generator], list[Points]]] = {
    "ellipse": _ellipse,
    "rectangle": _rectangle,
    "rounded": _rounded,
    "polygon": _polygon,
    "star": _star,
    "blob": _blob,
    "ring": _ring,
    "crescent": _crescent,
    "bar": _bar,
}
LETTERS = "letter"
