"""Checkpoints and model repositories for benchmarks, built from seeds and cached.

Everything goes to `build/benchmarks/`, under a key derived from the sources that build it and from
the installed versions: a change triggers a rebuild, and anything else comes from the cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

from benchmarks.environment import ROOT, versions
from benchmarks.random_weights import save_random_checkpoint
from export import repository
from export.accelerator import Accelerator
from export.architecture import Architecture
from export.checkpoint import load
from export.pipeline import write_repository

BUILD = ROOT / "build" / "benchmarks"
SEED = 0
DEMO_CHECKPOINT = ROOT / "demo" / "checkpoint.pt"
SOURCES = (
    "export/*.py",
    "benchmarks/random_weights.py",
    "model_repository/**/*",
    *(f"client/triton_sam3/{name}" for names in repository.SHARED.values() for name in names),
)


@dataclass(frozen=True)
class Artifacts:
    """One model: its checkpoint in Meta's layout and the repository exported from it."""

    name: str
    checkpoint: Path
    repository: Path


def full_size(
    dtype: torch.dtype = torch.float32,
    progress: Callable[[str], None] = lambda _: None,
    accelerator: Accelerator | None = None,
) -> Artifacts:
    """SAM 3 at its published size with seeded random weights."""
    folder = _folder("full-size", ())
    checkpoint = folder / "sam3.pt"
    with _build_lock(folder):
        if not checkpoint.exists():
            progress("seeding full-size weights")
            _write_atomically(
                checkpoint, lambda to: save_random_checkpoint(Architecture(), to, SEED)
            )
    return _exported("full size", checkpoint, folder, dtype, None, progress, accelerator)


def demo(
    dtype: torch.dtype = torch.float32,
    image_size: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
    accelerator: Accelerator | None = None,
) -> Artifacts:
    """The small trained model of the demo, at its own or another image size."""
    folder = _folder("demo", (DEMO_CHECKPOINT,))
    return _exported("demo", DEMO_CHECKPOINT, folder, dtype, image_size, progress, accelerator)


def _exported(
    name: str,
    checkpoint: Path,
    folder: Path,
    dtype: torch.dtype,
    image_size: int | None,
    progress: Callable[[str], None],
    accelerator: Accelerator | None,
) -> Artifacts:
    chosen = [str(dtype).removeprefix("torch.")]
    chosen += [str(image_size)] if image_size else []
    chosen += [accelerator.value] if accelerator else []
    output = folder / "-".join(["models", *chosen])
    with _build_lock(folder):
        if not output.exists():
            progress(f"exporting the {name} model: {', '.join(chosen)}")
            _export(checkpoint, output, dtype, image_size, accelerator)
    return Artifacts(name, checkpoint, output)


def _export(
    checkpoint: Path,
    output: Path,
    dtype: torch.dtype,
    image_size: int | None,
    accelerator: Accelerator | None,
) -> None:
    """Like `python -m export`, without the check against PyTorch: benchmarks have their own."""
    with repository.new_repository(output, overwrite=True) as folder:
        write_repository(folder, load(checkpoint, image_size), dtype, accelerator)


def _folder(name: str, inputs: Iterable[Path]) -> Path:
    files = [path for pattern in SOURCES for path in sorted(ROOT.glob(pattern)) if path.is_file()]
    state = hashlib.sha256(versions().encode())
    for path in (*files, *inputs):
        if "__pycache__" not in path.parts:
            state.update(path.read_bytes())
    return BUILD / f"{name}-{state.hexdigest()[:12]}"


@contextmanager
def _build_lock(folder: Path) -> Iterator[None]:
    """Make a concurrent run, of benchmarks or tests, wait for what this one builds.

    Older builds of the same name are deleted, unless a running process uses them.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILD / ".lock"):
        folder.mkdir(exist_ok=True)
        _hold(folder)
        for old in BUILD.glob(f"{folder.name.rpartition('-')[0]}-*"):
            _delete_unless_in_use(old)
        yield


@cache
def _hold(folder: Path) -> None:
    """Keep other processes from deleting a folder for as long as this one lives."""
    fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_SH)


def _delete_unless_in_use(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    except BlockingIOError:
        pass
    finally:
        os.close(opened)


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write to a temporary name first, so that an interrupted run leaves no partial file."""
    partial = path.with_name(f".{path.name}")
    write(partial)
    partial.rename(path)
