"""A model of SAM 3's architecture that exports in seconds, and its exports, made once."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from filelock import FileLock
from typer import Typer
from typer.testing import CliRunner, Result

from benchmarks.random_weights import save_random_checkpoint
from export.__main__ import main
from export.architecture import Architecture
from export.repository import MODELS

ARCHITECTURE = Architecture(
    image_size=112,
    pretrain_image_size=56,
    embed_dim=48,
    depth=2,
    num_heads=4,
    mlp_dim=96,
    window_size=4,
    global_att_blocks=(1,),
    d_model=64,
    decoder_depth=1,
    decoder_mlp_dim=64,
    iou_head_hidden_dim=32,
)
SINGLE_MASK_SCALE = 170
"""How much steeper than random the logits of `multimask_output=False` are: so steep that some
objects' masks are stable, and so flat that the others fall back to a candidate."""

_app = Typer(add_completion=False)
_app.command()(main)


@dataclass(frozen=True)
class Export:
    """A checkpoint, the model repository made from it, and the command's output."""

    checkpoint: Path
    repository: Path
    exit_code: int
    stdout: str
    stderr: str


def save(path: Path, architecture: Architecture = ARCHITECTURE) -> None:
    """Write seeded random weights."""
    save_random_checkpoint(architecture, path, seed=0)
    weights = torch.load(path)
    for name in ("weight", "bias"):
        key = f"tracker.sam_mask_decoder.output_hypernetworks_mlps.0.layers.2.{name}"
        weights["model"][key] *= SINGLE_MASK_SCALE
    torch.save(weights, path)


def run(*arguments: object) -> Result:
    """`python -m export` in this process."""
    return CliRunner().invoke(_app, [str(argument) for argument in arguments])


def export_once(folder: Path, precision: str) -> Export:
    """Export to `folder`, over an older repository, unless a worker of this run has already."""
    saved, repository, said = folder / "tiny.pt", folder / "models", folder / "said.json"
    with FileLock(f"{folder}.lock"):
        if not said.exists():
            for name in MODELS:
                (repository / name).mkdir(parents=True)
                (repository / name / "old").touch()
            save(saved)
            options = ("--precision", precision, "--overwrite")
            result = run("--checkpoint", saved, "--output", repository, *options)
            said.write_text(json.dumps([result.exit_code, result.stdout, result.stderr]))
    return Export(saved, repository, *json.loads(said.read_text()))


def resized(image_size: int) -> Architecture:
    """The tiny model for another image size."""
    return replace(ARCHITECTURE, image_size=image_size)
