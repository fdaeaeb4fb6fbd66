"""Training pictures on disk: generated once, in chunks, by several processes; read as arrays.

Seeds below `FIRST_TRAINING_SEED` are never trained on; `demo.measure` takes its pictures from them.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from demo.scenes import generate

FIRST_TRAINING_SEED = 1_000_000
CHUNK = 500
"""Pictures per file."""


@dataclass(frozen=True)
class Pictures:
    """Pictures (uint8 [S, S, 3]) and their labels (uint8 [S, S]), memory-mapped in chunks.

    All chunks but the last hold `CHUNK` of them.
    """

    images: list[NDArray[np.uint8]]
    labels: list[NDArray[np.uint8]]

    def __len__(self) -> int:
        return sum(map(len, self.images))

    def batch(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Gather pictures by number: images [B, S, S, 3] and labels [B, S, S]."""
        places = [divmod(int(i), CHUNK) for i in indices]
        return (
            np.stack([self.images[chunk][i] for chunk, i in places]),
            np.stack([self.labels[chunk][i] for chunk, i in places]),
        )


def prepare(folder: Path, count: int, size: int) -> Pictures:
    """Generate whichever of `count` pictures are missing under `folder`, and open them all."""
    folder = folder / str(size)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = range(-(-count // CHUNK))
    absent = [i for i in numbers if not _path(folder, "labels", i).is_file()]
    # Spawned, not forked: forking a process with threads (PyTorch's, gRPC's) may hang.
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        made = pool.map(partial(_write, folder, size, CHUNK), absent)
        for _ in track(made, "generating pictures", len(absent), disable=not absent):
            pass
    return Pictures(
        *(
            [np.load(_path(folder, name, i), mmap_mode="r") for i in numbers]
            for name in ("images", "labels")
        )
    )


def _path(folder: Path, name: str, chunk: int) -> Path:
    return folder / f"{name}-{chunk:04d}.npy"


def _write(folder: Path, size: int, count: int, chunk: int) -> None:
    """Generate a chunk of `count`; its labels, renamed into place last, mark it as complete."""
    cv2.setNumThreads(1)
    first = FIRST_TRAINING_SEED + chunk * count
    scenes = [generate(seed, size) for seed in range(first, first + count)]
    np.save(_path(folder, "images", chunk), np.stack([scene.image for scene in scenes]))
    partial_path = _path(folder, "partial", chunk)
    np.save(partial_path, np.stack([scene.labels for scene in scenes]))
    partial_path.replace(_path(folder, "labels", chunk))
