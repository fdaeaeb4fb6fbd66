"""Training: it learns, changes the size midway, and resumes after an interruption."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from demo import pictures, train
from demo.batches import batches
from demo.model import ARCHITECTURE, build, resized
from demo.pictures import Pictures
from demo.scenes import generate
from export import checkpoint


@pytest.fixture
def small_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four pictures per chunk and two per step, so that a step is quick."""
    monkeypatch.setattr(pictures, "CHUNK", 4)
    monkeypatch.setattr(train, "BATCH", 2)
    monkeypatch.setattr(train, "QUERIES", 4)
    monkeypatch.setattr(train, "STATE_EVERY", 2)


def settings(folder: Path, steps: int) -> train.Settings:
    return train.Settings(folder / "model.pt", folder, None, 0.0, 0.0, steps, 0, 4, 2, seed=0)


def test_pictures_are_generated_once_and_are_not_the_held_out_ones(
    small_training: None, tmp_path: Path
) -> None:
    shown = pictures.prepare(tmp_path, 8, 56)
    assert len(shown) == 8
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    again = pictures.prepare(tmp_path, 8, 56)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")} == written
    images, labels = again.batch(np.array([5]))
    scene = generate(pictures.FIRST_TRAINING_SEED + 5, 56)
    assert np.array_equal(images[0], scene.image)
    assert np.array_equal(labels[0], scene.labels)


def test_learning_rates_rise_stay_and_fall() -> None:
    assert train.rate(0) < 0.1
    assert train.rate(train.WARMUP) == 1
    assert train.rate(train.DECAY_FROM) == 1
    assert 0 < train.rate((1 + train.DECAY_FROM) / 2) < 1
    assert train.rate(1) == pytest.approx(0)


def test_a_run_writes_a_full_size_checkpoint_and_resumes(
    small_training: None, tmp_path: Path
) -> None:
    train._train(settings(tmp_path, 4))
    model = checkpoint.load(tmp_path / "model.pt")
    assert model.architecture == ARCHITECTURE
    assert (tmp_path / "model.pt").stat().st_size < 20 * 2**20
    before = torch.load(tmp_path / "state.pt", weights_only=False)["step"]
    train._train(settings(tmp_path, before + 2))
    assert torch.load(tmp_path / "state.pt", weights_only=False)["step"] > before
    other = replace(settings(tmp_path, before + 4), start=tmp_path / "model.pt")
    with pytest.raises(typer.BadParameter, match="started from scratch, which would be resumed"):
        train._train(other)


def test_a_checkpoint_continues_at_full_size_with_falling_rates(
    small_training: None, tmp_path: Path
) -> None:
    trained = build(5, train.SMALL)
    checkpoint.save(resized(trained, ARCHITECTURE.image_size), tmp_path / "first.pt")
    goes_on = replace(settings(tmp_path, 2), start=tmp_path / "first.pt", begin=0.85)
    shown = pictures.prepare(tmp_path / "pictures", 4, ARCHITECTURE.image_size)
    run = train._resumed(goes_on, shown)
    assert run.model.architecture == ARCHITECTURE
    torch.testing.assert_close(
        run.model.trunk.blocks[0].attn.qkv.weight, trained.trunk.blocks[0].attn.qkv.weight
    )
    assert train._progress(run, goes_on) == 0.85
    run.step = 2
    assert train._progress(run, goes_on) == 1


def test_weights_can_be_averaged_with_the_initial_ones(
    small_training: None, tmp_path: Path
) -> None:
    run = train.new_run(build(1, ARCHITECTURE.image_size))
    first = build(2, ARCHITECTURE.image_size)
    checkpoint.save(first, tmp_path / "first.pt")
    train._save(
        run,
        tmp_path / "state.pt",
        replace(settings(tmp_path, 1), start=tmp_path / "first.pt", keep=0.25),
    )
    saved = checkpoint.load(tmp_path / "model.pt")
    for mean, trained, before in zip(
        saved.parameters(), run.average.parameters(), first.parameters(), strict=True
    ):
        torch.testing.assert_close(mean, 0.75 * trained + 0.25 * before, rtol=2e-3, atol=1e-4)


def test_one_batch_is_learnt(small_training: None) -> None:
    """The pixel loss falls by a third in a few steps on one batch: gradients are right."""
    scene = generate(0, 112)
    shown = Pictures([scene.image[None]], [scene.labels[None]])
    run = train.new_run(build(0, train.SMALL))
    images, objects = next(batches(shown, run.model.architecture, 1, 8, np.random.default_rng(0)))
    for _ in range(25):
        train.train_step(run, images, objects, 0.05, np.random.default_rng(0))
    losses = run.recent["pixel"]
    assert losses[-1] < 0.67 * losses[0]
