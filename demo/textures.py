"""Surfaces of generated pictures: colours that vary over a square, and the light on them.

Everything is float32: RGB in about [0, 1] of shape [S, S, 3], or a factor of shape [H, W, 1].
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]


def noise(rng: np.random.Generator, size: int, cells: int) -> Field:
    """Smooth noise of about `cells` bumps across, [S, S], mean 0 and standard deviation near 1."""
    coarse = rng.standard_normal((cells + 3, cells + 3), dtype=np.float32)
    return np.asarray(cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC))


def ramp(rng: np.random.Generator, size: int) -> Field:
    """A gradient in a random direction, [S, S], from -1 to 1 across the picture."""
    angle = rng.uniform(0, 2 * np.pi)
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    return np.asarray(np.cos(angle) * axis[None] + np.sin(angle) * axis[:, None], np.float32)


def pattern(rng: np.random.Generator, size: int) -> Field:
    """A repeated or irregular pattern, [S, S], within [-1, 1], characteristic of a surface."""
    kind = rng.integers(6)
    if kind == 0:
        stripes = np.sin(ramp(rng, size) * min(rng.uniform(15, 70), size / 2))
        return np.asarray(stripes, np.float32)
    if kind == 1:
        waves = min(rng.uniform(12, 50), size / 2)
        checks = np.sin(ramp(rng, size) * waves) * np.sin(ramp(rng, size) * waves)
        return np.asarray(np.sign(checks), np.float32)
    if kind == 2:
        return np.clip(noise(rng, size, int(rng.integers(3, 12))), -1, 1)
    if kind == 3:
        return np.clip(noise(rng, size, min(int(rng.integers(20, 90)), size // 2)), -1, 1)
    if kind == 4:
        marble = ramp(rng, size) * rng.uniform(8, 25) + noise(rng, size, 5) * 2
        return np.sin(marble).astype(np.float32)
    octaves = sum(noise(rng, size, 4 * 2**i) / 1.6**i for i in range(4))
    return np.clip(np.asarray(octaves, np.float32) / 2, -1, 1)


def surface(rng: np.random.Generator, size: int, colour: Field, contrast: float) -> Field:
    """A surface around one colour ([3]): plain, shaded by a ramp, or patterned."""
    second = rng.normal(0, 1, 3).astype(np.float32) * contrast
    grey = np.float32(rng.normal(0, 1) * contrast)
    tint = second if rng.random() < 0.5 else np.full(3, grey, np.float32)
    field = np.zeros((size, size), np.float32)
    if rng.random() < 0.65:
        field += pattern(rng, size) * rng.choice([0.3, 0.7, 1.0])
    if rng.random() < 0.5:
        field += ramp(rng, size)
    return np.asarray(colour + field[..., None] * tint, np.float32)


def relief(rng: np.random.Generator, alpha: Field) -> Field:
    """Light on an embossed disc or lump of the given alpha, as a factor [S, S, 1] around 1."""
    height = cv2.GaussianBlur(alpha, (0, 0), rng.uniform(0.8, 3)) * rng.uniform(2, 7)
    grain = noise(rng, max(alpha.shape), max(2, int(max(alpha.shape) * rng.uniform(0.1, 0.3))))
    height += grain[: alpha.shape[0], : alpha.shape[1]] * alpha * rng.uniform(0.1, 0.7)
    angle = rng.uniform(0, 2 * np.pi)
    slope = np.cos(angle) * cv2.Sobel(height, cv2.CV_32F, 1, 0, scale=0.125)
    slope += np.sin(angle) * cv2.Sobel(height, cv2.CV_32F, 0, 1, scale=0.125)
    return np.asarray(1 + np.clip(slope, -1, 1) * rng.uniform(0.3, 0.9), np.float32)[..., None]


def volume(rng: np.random.Generator, alpha: Field) -> Field:
    """Shading of a rounded body, darker towards its rim, as a factor [S, S, 1] up to 1."""
    inside = (alpha > 0.5).astype(np.uint8)
    depth = cv2.distanceTransform(inside, cv2.DIST_L2, 3)
    reach = max(float(depth.max()), 1.0) * rng.uniform(0.3, 1.0)
    return np.asarray(
        1 - rng.uniform(0.2, 0.7) * (1 - np.clip(depth / reach, 0, 1)) ** 2, np.float32
    )[..., None]


def shadow(rng: np.random.Generator, alpha: Field, reach: float) -> Field:
    """The shadow cast `reach` pixels away on what lies below, as a factor [S, S, 1] up to 1."""
    angle = rng.uniform(0, 2 * np.pi)
    shift = np.array([[1, 0, reach * np.cos(angle)], [0, 1, reach * np.sin(angle)]], np.float32)
    moved = cv2.warpAffine(alpha, shift, alpha.shape[::-1])
    soft = cv2.GaussianBlur(moved, (0, 0), max(0.5, reach * rng.uniform(0.3, 0.8)))
    return np.asarray(1 - rng.uniform(0.2, 0.7) * soft, np.float32)[..., None]
