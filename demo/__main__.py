"""python -m demo: from the small checkpoint to segmented pictures, through a real tritonserver.

demo/checkpoint.pt ─export─► build/demo/models ─server─► tritonserver ◄─client─► build/demo/*.png
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import cv2
import numpy as np
import skimage.data
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

from demo.prompts import box, interior, iou
from demo.scenes import generate
from export.interruption import unwind_on_signals
from server import ServerError, TritonServer
from triton_sam3 import Client, Prompt, SAM3Error

CHECKPOINT = Path(__file__).with_name("checkpoint.pt")
OUTPUT = Path("build/demo")
SCENE_SEED = 503
"""A picture used neither in training (demo/pictures.py) nor among the 500 of demo/measure.py, and
about as hard for the model as the median object of those."""
SCENE_SIDE = 448

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Example:
    """A picture, its prompts, and the true masks if they are known."""

    name: str
    image: NDArray[np.uint8]
    prompts: list[Prompt]
    truth: NDArray[np.bool_] | None = None


class ExportFailed(Exception):
    """The demo model could not be exported; the message says why."""


def main() -> int:
    """Export, serve, segment and draw; the server stops with this program, however it exits."""
    argparse.ArgumentParser(
        prog="python -m demo",
        description=f"Export the small trained model, serve it, and draw what it segments into "
        f"pictures in {OUTPUT}. Takes a few minutes and no arguments.",
    ).parse_args()
    unwind_on_signals()
    try:
        models = OUTPUT / "models"
        with _step("exporting the demo model (python -m export)"):
            _export(models)
        with _running(models) as server, Client(server.grpc_url) as client:
            console.print(f"  {server.http_url}  {server.grpc_url}  {server.metrics_url}")
            rows = [_segment(client, example) for example in _examples()]
        _report(rows)
    except KeyboardInterrupt:
        console.print("\nstopped; the server is down and nothing is left running")
        return 130
    except (ExportFailed, ServerError, SAM3Error, OSError) as error:
        console.print(f"error: {error}", markup=False)
        return 1
    return 0


def _export(models: Path) -> None:
    warnings.filterwarnings("ignore")  # sam3's and the exporter's own deprecated calls
    import torch  # noqa: PLC0415 - seconds

    from export.accelerator import Accelerator  # noqa: PLC0415
    from export.pipeline import (  # noqa: PLC0415
        BAD_EXPORT,
        BAD_INPUT,
        export_repository,
    )

    try:
        # Triton may see a GPU that torch does not, for instance with an older driver.
        fixed = None if torch.cuda.is_available() else Accelerator.CPU
        export_repository(CHECKPOINT, models, accelerator=fixed, overwrite=True)
    except (*BAD_INPUT, *BAD_EXPORT) as error:
        raise ExportFailed(str(error)) from error


@contextmanager
def _running(models: Path) -> Iterator[TritonServer]:
    server = TritonServer(models, log=OUTPUT / "tritonserver.log")
    try:
        with _step("starting tritonserver and waiting for its first answer"):
            server.start()
        yield server
    finally:
        with _step("stopping tritonserver"):
            server.stop()


@contextmanager
def _step(what: str) -> Iterator[None]:
    started = time.monotonic()
    with console.status(what):
        yield
    console.print(f"✓ {what}: {time.monotonic() - started:.1f} s")


def _examples() -> list[Example]:
    scene = generate(SCENE_SEED, SCENE_SIDE)
    largest = np.argsort(-scene.masks.sum(axis=(1, 2)))[:5]
    truth = scene.masks[largest]
    coins = cv2.cvtColor(skimage.data.coins(), cv2.COLOR_GRAY2RGB)
    coffee = skimage.data.coffee()
    return [
        Example("clicks", scene.image, [Prompt(points=[interior(mask)]) for mask in truth], truth),
        Example("boxes", scene.image, [Prompt(box=box(mask)) for mask in truth], truth),
        Example("coins", coins, [Prompt(points=[xy]) for xy in ((46, 125), (217, 50), (302, 260))]),
        Example("coin-boxes", coins, [Prompt(box=corners) for corners in COIN_BOXES]),
        Example("coffee", coffee, [Prompt(box=(165, 15, 412, 270))]),
    ]


COIN_BOXES = ((20, 32, 68, 78), (303, 13, 365, 76), (181, 165, 243, 224), (246, 93, 299, 144))
"""Boxes around four coins of the photo, as a detector would return them."""


@dataclass(frozen=True)
class Row:
    """What is reported about one example."""

    path: Path
    objects: int
    predicted: float
    true: float | None
    milliseconds: float


def _segment(client: Client, example: Example) -> Row:
    started = time.monotonic()
    result = client.segment(example.image, prompts=example.prompts)
    elapsed = time.monotonic() - started
    path = OUTPUT / f"{example.name}.png"
    drawn = result.draw(example.image, prompts=example.prompts)
    Image.fromarray(drawn).save(path)
    return Row(
        path,
        len(result),
        float(result.scores.mean()),
        None if example.truth is None else mean(map(iou, result.masks, example.truth)),
        elapsed * 1e3,
    )


def _report(rows: list[Row]) -> None:
    table = Table("picture", "objects", "predicted IoU", "true IoU", "request")
    for row in rows:
        true = "unknown" if row.true is None else f"{row.true:.2f}"
        milliseconds = f"{row.milliseconds:.0f} ms"
        table.add_row(str(row.path), str(row.objects), f"{row.predicted:.2f}", true, milliseconds)
    console.print(table)
    tools = shlex.quote(str(Path(sys.executable).parent))
    for what, command in (
        (
            "keep the demo model served",
            f"{tools}/python -m server {OUTPUT / 'models'}",
        ),
        (
            "segment a picture of your own",
            f"{tools}/triton-sam3 segment PHOTO --point X,Y --output out.png",
        ),
        (
            "click on it in a browser",
            f"{tools}/python examples/browser.py PHOTO",
        ),
        (
            "export SAM 3 itself",
            f"{tools}/python -m export --checkpoint sam3.pt --output build/models",
        ),
    ):
        console.print(f"{what}:\n  {command}")


if __name__ == "__main__":
    sys.exit(main())
