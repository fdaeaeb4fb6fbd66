"""The files that `Segmentation.save` writes, and reading one back."""

from __future__ import annotations

import io
import os
import secrets
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file to write to, which takes the place of `path` once it is complete.

    After an error, as on a full disk, `path` is what it was before.
    """
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{secrets.token_hex(8)}{target.suffix}")
    try:
        yield partial
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def arrays(result: Segmentation) -> bytes:
    """All fields of a result as an .npz file, without pickles."""
    file = io.BytesIO()  # given a path, NumPy would append .npz to an upper-case suffix
    np.savez_compressed(
        file,
        **{name: getattr(result, name) for name in ARRAYS},
        **{name: np.array(getattr(result, name), np.str_) for name in TEXTS},
        image_size=np.array(result.image_size),
        parent_id=np.array(result.parent_id),
    )
    return file.getvalue()


def read_arrays(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of a result that `arrays` made; ValueError for any other file."""
    try:
        with np.load(path, allow_pickle=False) as loaded:
            width, height = (int(side) for side in loaded["image_size"])
            return {
                **{name: loaded[name] for name in ARRAYS},
                **{name: tuple(loaded[name].tolist()) for name in TEXTS},
                "image_size": (width, height),
                "parent_id": str(loaded["parent_id"]),
            }
    except _DAMAGED as error:
        raise ValueError(
            f"{os.fspath(path)!r} cannot be loaded: pass an .npz file from Segmentation.save; "
            ".json files and pictures do not hold a whole result"
        ) from error
