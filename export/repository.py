"""A model repository on disk: the hand-written configs and the artifacts built for them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from google.protobuf import text_format  # type: ignore[import-untyped]
from tritonclient.grpc import model_config_pb2

from export.accelerator import Accelerator, compiled_by_tensorrt, place
from export.architecture import Architecture
from export.encoder import FEATURES

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = ROOT / "model_repository"
ENCODER, DECODER, ENSEMBLE = "sam3_image_encoder", "sam3_prompt_decoder", "sam3_interactive"
READER, WRITER = "sam3_image_reader", "sam3_mask_writer"
ENSEMBLES = (ENSEMBLE, "sam3_interactive_rle", "sam3_interactive_file", "sam3_click_rle")
MODELS = (ENCODER, DECODER, READER, WRITER, *ENSEMBLES)

SHARED_SOURCE = ROOT / "client" / "triton_sam3"
SHARED_PACKAGE = "sam3_shared"
SHARED = {READER: ("contract.py", "errors.py", "geometry.py"), WRITER: ("formats.py", "masks.py")}
"""The client's code for pixels and logits, which two models run for callers without the client. It
is written once, in the client, and copied next to those models' own files, so that results are the
same and the server does not need the client."""


class OutputError(Exception):
    """The output folder cannot be written; the message says why."""


@contextmanager
def new_repository(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to build in, which becomes `output` on success and is removed otherwise.

    Raises `OutputError` if `output` must not be replaced or cannot be written.
    """
    check_output(output, overwrite=overwrite)
    output = output.resolve()
    missing = [folder for folder in output.parents if not folder.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(
            prefix=f".{output.name}.", dir=output.parent, ignore_cleanup_errors=True
        ) as scratch:
            folder = Path(scratch) / "new"
            folder.mkdir()
            yield folder
            check_output(output, overwrite=overwrite)  # again: exporting took minutes
            _replace(output, folder, aside=Path(scratch) / "old")
    except OSError as error:
        raise OutputError(
            f"{output} cannot be written: {error.strerror or error}; it is built in "
            f"{output.parent}, which must be writable and have enough space"
        ) from error
    finally:
        for folder in missing:
            with suppress(OSError):  # not empty: the export succeeded
                folder.rmdir()


def _replace(output: Path, folder: Path, aside: Path) -> None:
    """Replace `output` with two renames, so that it is never incomplete.

    Interrupted at any point, one of the two repositories is there.
    """
    try:
        if output.exists():
            output.rename(aside)
        folder.rename(output)
    finally:
        if aside.exists() and not output.exists():
            aside.rename(output)


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise `OutputError` if `output` holds something that must not be replaced."""
    try:
        _check_replaceable(output, overwrite=overwrite)
    except OSError as error:  # path too long or folder not accessible
        raise OutputError(f"{output} cannot be accessed: {error.strerror}") from error


def _check_replaceable(output: Path, *, overwrite: bool) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise OutputError(f"{output} is a file; give a folder that does not exist yet")
    if output.resolve().is_mount():
        raise OutputError(
            f"{output} is a mount point, which cannot be replaced as a whole; give a folder in it, "
            f"such as {output / 'models'}"
        )
    others = sorted(entry.name for entry in output.iterdir() if entry.name not in MODELS)
    if others:
        raise OutputError(
            f"refusing to replace {output}: it contains {others[0]}, which is not part of a model "
            "repository; give another folder"
        )
    if any(output.iterdir()) and not overwrite:
        raise OutputError(
            f"{output} already holds a model repository; pass --overwrite to replace it, or give "
            "another folder"
        )


def copy_sources(
    target: Path,
    architecture: Architecture,
    dtype: torch.dtype,
    accelerator: Accelerator | None = None,
) -> None:
    """Copy configs and Python files.

    Dims and the embeddings' type are set to the model's, and the device of encoder and decoder to
    the accelerator's.
    """
    for name in MODELS:
        shutil.copytree(
            TEMPLATES / name, target / name, ignore=shutil.ignore_patterns("__pycache__", ".*")
        )
        (target / name / "1").mkdir(exist_ok=True)
        config = target / name / "config.pbtxt"
        text = adapt_config(config.read_text(), architecture, dtype)
        if accelerator and name in (ENCODER, DECODER):
            text = place(text, accelerator)
        if accelerator is Accelerator.TENSORRT and name == ENCODER:
            text = compiled_by_tensorrt(text, architecture.image_size)
        config.write_text(text)
    for name, modules in SHARED.items():
        _copy_shared(target / name / "1" / SHARED_PACKAGE, modules)


def _copy_shared(package: Path, modules: Iterable[str]) -> None:
    """Copy modules as a package, because they import each other by relative names."""
    package.mkdir()
    (package / "__init__.py").write_text(f'"""Copied from {SHARED_SOURCE.name} by the export."""\n')
    for module in modules:
        shutil.copy2(SHARED_SOURCE / module, package)


def adapt_config(text: str, architecture: Architecture, dtype: torch.dtype) -> str:
    """Adapt a config written for SAM 3's sizes to other sizes and another embedding type."""
    ours = dict(zip(map(str, _sizes(Architecture())), map(str, _sizes(architecture)), strict=True))

    def rescale(dims: re.Match[str]) -> str:
        return re.sub(r"\d+", lambda number: ours.get(number[0], number[0]), dims[0])

    text = re.sub(r"dims: \[.*?\]", rescale, text)
    if dtype == torch.float16:
        embedding = rf'(name: "(?:{"|".join(FEATURES)})"[^}}]*?data_type: )TYPE_FP32'
        text = re.sub(embedding, r"\1TYPE_FP16", text)
    return text


def _sizes(a: Architecture) -> tuple[int, ...]:
    """Every size in the configs that depends on the model; in the published one all differ."""
    return (
        *(a.image_size, a.grid, 2 * a.grid, a.mask_size),
        *(a.d_model, a.d_model // 4, a.d_model // 8),
    )


def read_config(repository: Path, model: str) -> model_config_pb2.ModelConfig:
    """Parse one model's config.pbtxt."""
    text = (repository / model / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())
