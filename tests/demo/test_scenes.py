"""Generated pictures: reproducible, labelled without gaps, and varied."""

from __future__ import annotations

import numpy as np
import pytest

from demo import shapes
from demo.scenes import MIN_AREA, Scene, generate
from demo.shapes import Pose

SIZE = 112


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [generate(seed, SIZE) for seed in range(24)]


def test_a_seed_and_a_size_always_give_the_same_picture(scenes: list[Scene]) -> None:
    again = generate(3, SIZE)
    assert np.array_equal(again.image, scenes[3].image)
    assert np.array_equal(again.labels, scenes[3].labels)
    assert not np.array_equal(scenes[3].image, scenes[4].image)


def test_pictures_are_rgb_bytes_of_the_size_asked_for(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert scene.image.shape == (SIZE, SIZE, 3)
        assert scene.image.dtype == np.uint8
        assert scene.image.std() > 2


def test_objects_are_numbered_without_gaps_and_large_enough(scenes: list[Scene]) -> None:
    for scene in scenes:
        numbers = set(np.unique(scene.labels)) - {0}
        assert numbers == set(range(1, len(scene.masks) + 1))
        assert numbers
        assert scene.masks.sum((1, 2)).min() >= MIN_AREA * SIZE * SIZE


def test_masks_are_disjoint_and_cover_the_labels(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert scene.masks.sum(0).max() == 1
        assert np.array_equal(scene.masks.any(0), scene.labels > 0)


def test_objects_differ_from_what_surrounds_them(scenes: list[Scene]) -> None:
    """An invisible object would teach nothing: most differ in colour from the rest."""
    visible = []
    for scene in scenes:
        for mask in scene.masks:
            inside = scene.image[mask].mean(0)
            visible.append(np.abs(inside - scene.image[scene.labels == 0].mean(0)).max() > 5)
    assert np.mean(visible) > 0.85


def test_pictures_are_of_many_kinds(scenes: list[Scene]) -> None:
    grey = [np.ptp(scene.image.astype(int), axis=2).max() <= 1 for scene in scenes]
    assert 0 < sum(grey) < len(scenes)
    assert len({len(scene.masks) for scene in scenes}) > 5


@pytest.mark.parametrize("kind", [*shapes.KINDS, shapes.LETTERS])
def test_every_shape_fills_some_of_its_place(kind: str) -> None:
    rng = np.random.default_rng(0)
    alpha = shapes.draw(kind, Pose(60, 50, 30, 0.8, 0.3), rng, SIZE)
    assert alpha.shape == (SIZE, SIZE)
    assert alpha.min() == 0
    assert alpha.max() == 1
    ys, xs = np.nonzero(alpha > 0.5)
    assert 100 < len(ys) < np.pi * 60**2
    assert abs(xs.mean() - 60) < 30
    assert abs(ys.mean() - 50) < 30


def test_a_ring_has_a_hole() -> None:
    alpha = shapes.draw("ring", Pose(56, 56, 40, 1, 0), np.random.default_rng(0), SIZE)
    assert alpha[56, 56] == 0
