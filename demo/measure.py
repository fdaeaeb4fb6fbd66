"""python -m demo.measure: how well a demo checkpoint segments pictures it has never seen.

Every object of every picture is prompted with one click at its most interior pixel, then with
corrective clicks at the most interior pixel of the largest error, and with its box. Of the three
candidates, the one with the highest predicted IoU counts, as in the client.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from demo import prompts
from demo.model import Answer, Features, Prompts, decode, normalise
from demo.scenes import Scene, generate
from export import checkpoint
from export.architecture import InteractiveModel

CLICK, SECOND, THIRD = "one click", "second click", "third click"
SINGLE = "one click, multimask_output=False"
BOX = "box"

Ious = dict[str, list[float]]


def measure(model: InteractiveModel, seeds: range, progress: bool = False) -> Ious:
    """The IoU of every object in the pictures of `seeds`, by kind of prompt."""
    ious: Ious = defaultdict(list)
    for seed in track(seeds, "measuring", disable=not progress):
        scene = generate(seed, model.architecture.image_size)
        for kind, value in _ask(model, scene):
            ious[kind] += value
    return dict(ious)


@torch.no_grad()
def _ask(model: InteractiveModel, scene: Scene) -> Iterator[tuple[str, list[float]]]:
    features = model.encode(normalise(torch.from_numpy(scene.image)[None]))
    truths = scene.masks
    clicks = [prompts.interior(mask) for mask in truths]
    asked = Prompts(torch.tensor(clicks)[:, None], torch.ones(len(clicks), 1, dtype=torch.int32))
    for kind in (CLICK, SECOND, THIRD):
        answer = _decode(model, features, asked)
        best = answer.candidate(answer.best)
        predicted = _masks(best, scene)
        yield kind, _ious(predicted, truths)
        if kind == CLICK:
            yield SINGLE, _ious(_masks(single(model, answer), scene), truths)
        asked = _corrected(asked, best, predicted, truths)
    corners = torch.tensor([prompts.box(mask) for mask in truths]).view(-1, 2, 2)
    answer = _decode(model, features, Prompts.from_boxes(corners))
    best = answer.candidate(answer.best)
    yield BOX, _ious(_masks(best, scene), truths)


def single(model: InteractiveModel, answer: Answer) -> Tensor:
    """The mask with `multimask_output=False`: candidate 0, or the best one if it is unstable."""
    logits, _ = model.mask_decoder._dynamic_multimask_via_stability(answer.logits, answer.ious)
    return torch.as_tensor(logits)[:, 0]


def _decode(model: InteractiveModel, features: Features, asked: Prompts) -> Answer:
    return decode(model, features, torch.zeros(len(asked.coords), dtype=torch.int64), asked)


def _corrected(
    asked: Prompts, logits: Tensor, predicted: prompts.Mask, truths: prompts.Mask
) -> Prompts:
    """Add one click per object, and the last answer as the mask prompt."""
    clicks, labels = [], []
    for mask, truth in zip(predicted, truths, strict=True):
        region, missing = prompts.correction(mask, truth)
        clicks.append(prompts.interior(region))
        labels.append(int(missing))
    return asked.corrected(torch.tensor(clicks), torch.tensor(labels, dtype=torch.int32), logits)


def _masks(logits: Tensor, scene: Scene) -> prompts.Mask:
    """Convert logits [N, M, M] to boolean masks [N, S, S] at the picture's size."""
    size = scene.labels.shape
    full = functional.interpolate(logits[:, None], size, mode="bilinear", align_corners=False)
    return np.asarray(full[:, 0].numpy() > 0)


def _ious(predicted: prompts.Mask, truths: prompts.Mask) -> list[float]:
    return [prompts.iou(mask, truth) for mask, truth in zip(predicted, truths, strict=True)]


def main(
    path: Annotated[Path, typer.Argument(help="checkpoint")] = Path("demo/checkpoint.pt"),
    pictures: Annotated[int, typer.Option(help="held-out pictures")] = 500,
    threads: Annotated[int, typer.Option(help="torch threads")] = 2,
) -> None:
    """Print the mean IoU by kind of prompt."""
    torch.set_num_threads(threads)
    ious = measure(checkpoint.load(path), range(pictures), progress=True)
    objects = len(ious[CLICK])
    table = Table(title=f"{objects} objects in {pictures} held-out pictures")
    for column in ("prompt", "mean IoU", "median", "share above 0.5"):
        table.add_column(column)
    for kind, values in ious.items():
        above = np.mean(np.array(values) > 0.5)
        table.add_row(kind, f"{np.mean(values):.3f}", f"{np.median(values):.3f}", f"{above:.3f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
