"""Generated pictures with their true masks, which the demo model is trained and measured on.

    seed -> background -> objects, back to front -> light, blur, noise -> Scene

There are two kinds: a few overlapping objects of any shape, and many similar ones side by side,
such as coins. An object's mask is its visible part: a click means the topmost object at that pixel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from demo import shapes, textures
from demo.shapes import Alpha, Pose
from demo.textures import Field

Window = tuple[slice, slice]
SHADOW_REACH = 0.035
"""Maximum reach of a shadow, as a share of the picture's side."""
MIN_AREA = 0.004
"""An object whose visible part covers less than this share of the picture is only scenery."""
MIN_VISIBLE = 0.35
"""So is an object of which less than this share is visible."""


@dataclass(frozen=True)
class Scene:
    """A picture and the objects in it."""

    image: NDArray[np.uint8]
    """RGB, [S, S, 3]."""
    labels: NDArray[np.uint8]
    """[S, S]: the number (from 1) of the topmost object, or 0 where there is none."""

    @property
    def masks(self) -> NDArray[np.bool_]:
        """[N, S, S]: the visible region of every object."""
        numbers = np.arange(1, int(self.labels.max()) + 1, dtype=np.uint8)
        return np.asarray(self.labels == numbers[:, None, None])


@dataclass(frozen=True)
class _Style:
    """What the objects of one picture have in common."""

    contrast: float
    """Standard deviation of an object's colour about the background's."""
    texture: float
    relief: float
    volume: float
    shadow: float
    """Chances that an object has each of these."""


class _Canvas:
    """The picture while it is painted."""

    def __init__(self, background: Field) -> None:
        self.colours = background
        self.labels = np.zeros(background.shape[:2], np.uint8)
        self.areas: list[int] = []

    def paint(self, window: Window, alpha: Alpha, paint: Field) -> None:
        """Lay one more object on top, in a window of the picture."""
        colours = self.colours[window]
        colours += alpha[..., None] * (paint - colours)
        inside = alpha > 0.5
        self.areas.append(int(inside.sum()))
        self.labels[window][inside] = len(self.areas)

    def numbered(self) -> NDArray[np.uint8]:
        """The labels of the objects that count, numbered without gaps."""
        visible = np.bincount(self.labels.ravel(), minlength=len(self.areas) + 1)
        numbers = np.zeros(len(self.areas) + 1, np.uint8)
        for number, area in enumerate(self.areas, start=1):
            enough = max(MIN_AREA * self.labels.size, MIN_VISIBLE * area)
            if visible[number] >= enough:
                numbers[number] = numbers.max() + 1
        return numbers[self.labels]


def generate(seed: int, size: int) -> Scene:
    """Generate a seed's picture, `size` pixels square; the same arguments give the same one."""
    rng = np.random.default_rng(seed)
    while True:
        canvas = _many_alike(rng, size) if rng.random() < 0.35 else _mixed(rng, size)
        labels = canvas.numbered()
        if labels.any():
            return Scene(_photograph(rng, canvas.colours), labels)


def _background(rng: np.random.Generator, size: int) -> Field:
    colour = rng.uniform(0.1, 0.9, 3).astype(np.float32)
    ground = textures.surface(rng, size, colour, rng.choice([0.03, 0.08, 0.2]))
    if rng.random() < 0.3:
        ground += textures.noise(rng, size, 3)[..., None] * np.float32(0.08)
    return ground


def _style(rng: np.random.Generator) -> _Style:
    relief, volume, shadow = rng.choice([0.0, 0.3, 1.0], 3, p=[0.4, 0.35, 0.25])
    return _Style(rng.choice([0.12, 0.25, 0.4]), rng.uniform(0.02, 0.2), relief, volume, shadow)


def _mixed(rng: np.random.Generator, size: int) -> _Canvas:
    """A few objects of any kind and size, which may hide one another."""
    canvas = _Canvas(_background(rng, size))
    style = _style(rng)
    kinds = [*shapes.KINDS, shapes.LETTERS]
    for _ in range(rng.integers(2, 13)):
        radius = size * np.exp(rng.uniform(np.log(0.05), np.log(0.32)))
        x, y = rng.uniform(0.02, 0.98, 2) * size
        pose = Pose(x, y, radius, rng.uniform(0.5, 1), rng.uniform(0, 2 * np.pi))
        _add(rng, canvas, shapes.draw(str(rng.choice(kinds)), pose, rng, size), style)
    return canvas


def _many_alike(rng: np.random.Generator, size: int) -> _Canvas:
    """Rows of objects of one kind and of similar size and colour, mostly apart."""
    canvas = _Canvas(_background(rng, size))
    style = replace(_style(rng), relief=rng.choice([0.0, 1.0]))
    kind = str(rng.choice(["ellipse", "ellipse", "ellipse", "blob", "rounded", "polygon", "ring"]))
    alike = _colour(rng, canvas.colours.mean((0, 1)), style.contrast)
    rows, columns = rng.integers(2, 7, 2)
    squeeze = rng.uniform(0.65, 1)
    upright = rng.choice([0, np.pi / 2])
    radius = rng.uniform(0.28, 0.5) * size / max(rows, columns)
    for row, column in np.ndindex(rows, columns):
        if rng.random() < 0.1:
            continue
        jitter = rng.normal(0, 0.06, 2)
        x = (column + 0.5 + jitter[0]) / columns * size
        y = (row + 0.5 + jitter[1]) / rows * size
        turn = upright if kind == "ellipse" else rng.uniform(0, 2 * np.pi)
        pose = Pose(x, y, radius * rng.uniform(0.7, 1.15), squeeze, turn)
        _add(rng, canvas, shapes.draw(kind, pose, rng, size), style, alike)
    return canvas


def _colour(rng: np.random.Generator, around: Field, contrast: float) -> Field:
    """A colour visibly different from another, in lightness only or in hue too."""
    while True:
        step = rng.normal(0, contrast, 3) if rng.random() < 0.6 else rng.normal(0, contrast)
        colour = np.clip(around + step, 0.03, 0.97).astype(np.float32)
        if np.abs(colour - around).mean() > 0.06:
            return colour


def _add(
    rng: np.random.Generator,
    canvas: _Canvas,
    alpha: Alpha,
    style: _Style,
    alike: Field | None = None,
) -> None:
    """Paint one object, lit according to the style, onto the canvas."""
    size = len(alpha)
    if not (alpha > 0.5).any():
        return
    window = _window(alpha, round(3 * SHADOW_REACH * size))
    alpha = alpha[window]
    below = canvas.colours[window][alpha > 0.5].mean(0)
    colour = _colour(rng, below, style.contrast) if alike is None else alike
    colour = colour + rng.normal(0, 0.025, 3).astype(np.float32)
    paint = textures.surface(rng, max(alpha.shape), colour, style.texture)
    paint = paint[: alpha.shape[0], : alpha.shape[1]]
    if rng.random() < style.relief:
        paint = paint * textures.relief(rng, alpha)
    if rng.random() < style.volume:
        paint = paint * textures.volume(rng, alpha)
    if rng.random() < style.shadow:
        reach = size * rng.uniform(0.1, 1) * SHADOW_REACH
        canvas.colours[window] *= textures.shadow(rng, alpha, reach)
    canvas.paint(window, alpha, paint)


def _window(alpha: Alpha, margin: int) -> Window:
    """The part of the picture that a shape covers, with `margin` pixels around it."""
    x, y, width, height = cv2.boundingRect((alpha > 0).astype(np.uint8))
    return (
        slice(max(0, y - margin), y + height + margin),
        slice(max(0, x - margin), x + width + margin),
    )


def _photograph(rng: np.random.Generator, colours: Field) -> NDArray[np.uint8]:
    """Light the picture unevenly, blur it, sometimes make it grey, add noise, and quantise it."""
    size = len(colours)
    if rng.random() < 0.5:
        light = 1 + rng.uniform(0.05, 0.5) * textures.ramp(rng, size)
        colours = colours * light[..., None]
    if rng.random() < 0.5:
        colours = cv2.GaussianBlur(colours, (0, 0), rng.uniform(0.3, 1.6))
    if rng.random() < 0.35:
        colours = np.repeat(colours.mean(2, keepdims=True), 3, 2)
    if rng.random() < 0.7:
        channels = 1 if rng.random() < 0.5 else 3
        grain = rng.standard_normal((size, size, channels), dtype=np.float32)
        colours = colours + grain * np.float32(rng.uniform(0.005, 0.08))
    image: NDArray[np.uint8] = np.clip(colours * 255, 0, 255).astype(np.uint8)
    if rng.random() < 0.3:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(30, 90))]
        image = cv2.imdecode(cv2.imencode(".jpg", image, quality)[1], cv2.IMREAD_COLOR)
    return image
