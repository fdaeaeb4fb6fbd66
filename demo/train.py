"""python -m demo.train: train the demo checkpoint on generated pictures, on a CPU.

    pictures -> trunk, neck -> masks from single pixels               (from the start)
                            -> decoder: click, box, two corrections   (from DECODER_FROM on)

The first part of the run uses smaller pictures, where a step costs less than half.

After an interruption, repeating the command resumes from the last state under --work.
"""

from __future__ import annotations

import ctypes
import math
import platform
import time
from collections import defaultdict
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from demo import pictures
from demo.batches import Objects, batches, correct
from demo.losses import answer_loss, pixel_loss, true_ious
from demo.model import (
    ARCHITECTURE,
    Features,
    Prompts,
    build,
    decode,
    encode,
    init_patch_embedding,
    resized,
)
from demo.muon import Muon
from export import checkpoint
from export.architecture import InteractiveModel

console = Console()

BATCH = 16
QUERIES = 12
"""Objects per picture for the pixel loss."""
DECODED = 3
"""Objects per picture for the decoder."""
WARMUP, DECODER_FROM, DECAY_FROM, FULL_SIZE_FROM = 0.02, 0.12, 0.45, 0.72
"""Shares of the run after which rates are full, the decoder joins, rates fall, and pictures have
full size."""
CORRECTED = 0.4
"""Share of the steps at small size in which answers are corrected; at full size all are."""
SETTLING = 40
"""Steps over which rates rise, at the start and again after the change of size."""
SMALL = 2 * ARCHITECTURE.window_size * ARCHITECTURE.patch_size
"""Side of the first pictures: whole windows, because Meta's ViT pads others."""
TRUNK_RATE, OTHER_RATE = 0.015, 1e-3
WEIGHT_DECAY = 0.01
CLIP = 1.0
AVERAGE = 0.995
"""Decay of the moving average of the weights, which is what is saved."""
STATE_EVERY = 100
"""Steps between saving the state and printing a line."""


@dataclass
class Run:
    """Everything a resumed run needs."""

    model: InteractiveModel
    average: InteractiveModel
    optimisers: list[torch.optim.Optimizer]
    step: int = 0
    began: int = 0
    """The step at which the current picture size was introduced."""
    seconds: float = 0.0
    recent: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "step": self.step,
            "began": self.began,
            "seconds": self.seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step, self.began, self.seconds = state["step"], state["began"], state["seconds"]


def new_run(model: InteractiveModel) -> Run:
    """A run at step 0: Muon for the trunk's matrices, AdamW for everything else."""
    matrices = [p for p in model.trunk.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimisers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=TRUNK_RATE, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY),
    ]
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["full"] = group["lr"]
    return Run(model, deepcopy(model).requires_grad_(False), optimisers)


def at_size(run: Run, image_size: int) -> Run:
    """The same run with pictures of a different size; the optimisers start afresh."""
    grown = new_run(resized(run.model, image_size))
    grown.average = resized(run.average, image_size).requires_grad_(False)
    grown.step = grown.began = run.step
    grown.seconds = run.seconds
    return grown


def rate(progress: float) -> float:
    """Share of the full learning rates: a short warm-up, a plateau, a decay to zero."""
    if progress < WARMUP:
        return 0.05 + 0.95 * progress / WARMUP
    if progress < DECAY_FROM:
        return 1.0
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (progress - DECAY_FROM) / (1 - DECAY_FROM)))


def train_step(
    run: Run, images: Tensor, objects: Objects, progress: float, rng: np.random.Generator
) -> None:
    """One update of the weights and of their average."""
    features = encode(run.model, images)
    loss = pixel_loss(
        run.model, features, objects.owner, _places(objects.clicks, images), objects.truth
    )
    run.recent["pixel"].append(loss.item())
    if progress >= DECODER_FROM:
        asked = objects[: DECODED * len(images)]
        loss = 0.5 * loss + _decoder_loss(run, features, asked, rng)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(run.model.parameters(), CLIP)
    settled = min(1.0, (run.step - run.began + 1) / SETTLING)
    for optimiser in run.optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["full"] * rate(progress) * settled
        optimiser.step()
        optimiser.zero_grad()
    run.step += 1
    keep = min(AVERAGE, run.step / (run.step + 10))
    with torch.no_grad():
        for kept, new in zip(run.average.parameters(), run.model.parameters(), strict=True):
            kept.lerp_(new, 1 - keep)


def _places(clicks: Tensor, images: Tensor) -> Tensor:
    return (clicks[:, 0] + 0.5) / images.shape[-1]


def _decoder_loss(
    run: Run, features: Features, objects: Objects, rng: np.random.Generator
) -> Tensor:
    """Clicks on half of the objects and boxes around the rest, then two rounds of corrections."""
    half = len(objects) // 2
    asked = [
        (objects[:half], objects[:half].points(), "click"),
        (objects[half:], objects[half:].drawn_boxes(), "box"),
    ]
    losses = [_rounds(run, features, *one, rng) for one in asked]
    return torch.stack(losses).mean()


def _rounds(
    run: Run,
    features: Features,
    objects: Objects,
    prompts: Prompts,
    name: str,
    rng: np.random.Generator,
) -> Tensor:
    small = run.model.architecture != ARCHITECTURE
    corrections = 0 if small and rng.random() > CORRECTED else 2
    first, total = len(objects), torch.zeros(())
    for turn in range(1 + corrections):
        answer = decode(run.model, features, objects.owner, prompts)
        total = total + answer_loss(answer, objects.truth) * len(objects) / first
        chosen = answer.candidate(answer.best)
        heading = f"{name}+{turn}" if turn else name
        run.recent[heading].append(true_ious(chosen, objects.truth).mean().item())
        if turn < corrections:
            half = max(1, len(objects) // 2)
            prompts = correct(answer, prompts, objects, rng)[:half]
            objects = objects[:half]
    return total


def _report(run: Run, progress: float) -> None:
    means = "  ".join(f"{name} {np.mean(values):.3f}" for name, values in run.recent.items())
    console.print(f"step {run.step}  {progress:.1%}  {run.seconds / 60:.1f} min  {means}")
    run.recent.clear()


def _keep_memory() -> None:
    """Have glibc reuse large blocks: fetching new ones each step costs a third of the time."""
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        m_mmap_max, m_trim_threshold = -4, -1
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


@dataclass(frozen=True)
class Settings:
    """The command line's options."""

    output: Path
    work: Path
    start: Path | None
    begin: float
    keep: float
    steps: int
    minutes: float
    pictures: int
    threads: int
    seed: int


def main(
    output: Annotated[Path, typer.Option(help="the checkpoint to write")] = Path(
        "build/demo-training/checkpoint.pt"
    ),
    work: Annotated[Path, typer.Option(help="pictures and resumable state")] = Path(
        "build/demo-training"
    ),
    first: Annotated[
        Path | None, typer.Option("--start", help="start from this checkpoint's weights")
    ] = None,
    begin: Annotated[
        float, typer.Option(help="share of the run already completed by --start's weights")
    ] = FULL_SIZE_FROM,
    keep: Annotated[
        float, typer.Option(min=0, max=1, help="share of --start's weights in the result")
    ] = 0,
    steps: Annotated[int, typer.Option(help="total updates")] = 4000,
    minutes: Annotated[
        float, typer.Option(help="finish after this long instead, at any step; 0: no limit")
    ] = 0,
    count: Annotated[int, typer.Option("--pictures", help="pictures to train on")] = 8000,
    threads: Annotated[int, typer.Option(help="torch threads")] = 2,
    seed: int = 0,
) -> None:
    """Train the demo model from scratch, or resume an interrupted run."""
    settings = Settings(output, work, first, begin, keep, steps, minutes, count, threads, seed)
    _keep_memory()
    torch.set_num_threads(threads)
    _train(settings)


def _train(settings: Settings) -> None:
    shown = pictures.prepare(settings.work / "pictures", settings.pictures, ARCHITECTURE.image_size)
    run, saved = _resumed(settings, shown), settings.work / "state.pt"
    rng = np.random.default_rng([settings.seed, run.step])
    source = batches(shown, run.model.architecture, BATCH, QUERIES, rng)
    before, progress = time.monotonic() - run.seconds, 0.0
    while progress < 1:
        progress = _progress(run, settings)
        if progress >= FULL_SIZE_FROM and run.model.architecture != ARCHITECTURE:
            run = at_size(run, ARCHITECTURE.image_size)
            source = batches(shown, run.model.architecture, BATCH, QUERIES, rng)
        images, objects = next(source)
        run.seconds = time.monotonic() - before
        train_step(run, images, objects, progress, rng)
        if run.step % STATE_EVERY == 0 or progress >= 1:
            _report(run, progress)
            _save(run, saved, settings)


def _resumed(settings: Settings, shown: pictures.Pictures) -> Run:
    """The last saved run, or a new one."""
    saved = settings.work / "state.pt"
    if not saved.is_file() and settings.start is not None:
        return new_run(resized(checkpoint.load(settings.start), ARCHITECTURE.image_size))
    if not saved.is_file():
        model = build(settings.seed, SMALL)
        # Of every second pixel, for patches of about the scale of small pictures.
        init_patch_embedding(model, np.stack([image[::2, ::2] for image in shown.images[0]]))
        return new_run(model)
    state = torch.load(saved, weights_only=False)
    if state["start"] != _origin(settings):
        raise typer.BadParameter(
            f"{saved} belongs to a run started from {state['start'] or 'scratch'}, which would be "
            "resumed; give another --work, or delete it"
        )
    side = math.isqrt(state["model"]["trunk.pos_embed"].shape[1] - 1)
    run = new_run(build(settings.seed, side * ARCHITECTURE.patch_size))
    run.restore(state)
    return run


def _progress(run: Run, settings: Settings) -> float:
    limit, spent = (
        (60 * settings.minutes, run.seconds) if settings.minutes else (settings.steps, run.step)
    )
    begin = 0.0 if settings.start is None else settings.begin
    return begin + (1 - begin) * spent / limit


def _origin(settings: Settings) -> str:
    return "" if settings.start is None else str(settings.start.resolve())


def _save(run: Run, state: Path, settings: Settings) -> None:
    """Write both to temporary files first, so that an interruption leaves no partial file."""
    output = settings.output
    output.parent.mkdir(parents=True, exist_ok=True)
    full_size = resized(run.average, ARCHITECTURE.image_size)
    if settings.start is not None and settings.keep:
        _keep_weights(full_size, settings.start, settings.keep)
    partial = output.with_suffix(".partial")
    checkpoint.save(full_size, partial, dtype=torch.float16)
    partial.replace(output)
    partial = state.with_suffix(".partial")
    torch.save({**run.state(), "start": _origin(settings)}, partial)
    partial.replace(state)


@torch.no_grad()
def _keep_weights(model: InteractiveModel, start: Path, share: float) -> None:
    """Average the weights with those training started from (WiSE-FT, arXiv 2109.01903, eq. 1)."""
    first = resized(checkpoint.load(start), ARCHITECTURE.image_size)
    for trained, before in zip(model.parameters(), first.parameters(), strict=True):
        trained.lerp_(before, share)


if __name__ == "__main__":
    typer.run(main)
