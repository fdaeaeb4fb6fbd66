"""The files that `Segmentation.save` writes, and reading one back."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np

if TYPE_CHECKING:
    from .results import Segmentation

ARRAYS = ("masks", "scores", "boxes", "logits", "class_ids", "prompt_indices")
TEXTS = ("class_names", "detection_ids")

_DAMAGED = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
    RuntimeError,
    BadZipFile,
    zlib.error,
)
"""What NumPy and zipfile raise for damaged files, and for files of other kinds."""


def file_kind(path: Path, *, with_image: bool) -> str:
    """The lower-case suffix of a file that `Segmentation.save` can write; ValueError otherwise."""
    suffix = path.suffix.lower()
    if suffix not in (".json", ".npz", ".png", *((".jpg", ".jpeg") if with_image else ())):
        raise ValueError(
            f"cannot save to {path.name!r}: the suffix must be .json, .npz, .png, "
            "or .jpg together with the image"
        )
    return suffix


def write_arrays(result: Segmentation, file: IO[bytes]) -> None:
    """Write all fields of a result as an .npz file, without pickles."""
    np.savez_compressed(
        file,
        **{name: getattr(result, name) for name in ARRAYS},
        **{name: np.array(getattr(result, name), np.str_) for name in TEXTS},
        image_size=np.array(result.image_size),
        parent_id=np.array(result.parent_id),
    )


def read_arrays(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of a result that `write_arrays` wrote; ValueError for any other file."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            width, height = (int(side) for side in arrays["image_size"])
            return {
                **{name: arrays[name] for name in ARRAYS},
                **{name: tuple(arrays[name].tolist()) for name in TEXTS},
                "image_size": (width, height),
                "parent_id": str(arrays["parent_id"]),
            }
    except _DAMAGED as error:
        raise ValueError(
            f"{os.fspath(path)!r} cannot be loaded: pass an .npz file from Segmentation.save; "
            ".json files and pictures do not hold a whole result"
        ) from error
