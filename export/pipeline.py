"""Checkpoint → model repository, step by step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from export import check, checkpoint, repository
from export.accelerator import Accelerator
from export.architecture import InteractiveModel, SizeError
from export.decoder import export_decoder, save_decoder
from export.encoder import ImageEncoder, export_encoder
from export.signatures import SignatureError, check_signatures

DEFAULT_MIN_IOU = 0.995
EXACT_PHOTOS = check.PHOTOS[:1]
"""FP32 differs from the reference only by rounding, which one photo shows as well as many."""


class ToleranceError(Exception):
    """The exported graphs differ from PyTorch by more than allowed."""

    def __init__(self, checks: list[check.Check]) -> None:
        super().__init__("out of tolerance: " + ", ".join(c.name for c in checks if not c.passed))
        self.checks = checks


BAD_INPUT = (
    checkpoint.CheckpointError,
    SizeError,
    repository.OutputError,
    check.PhotoError,
)
BAD_EXPORT = (SignatureError, ToleranceError)
"""What `export_repository` raises, each with a message for the user."""


def export_repository(
    checkpoint_file: Path,
    output: Path,
    *,
    dtype: torch.dtype = torch.float32,
    accelerator: Accelerator | None = None,
    image_size: int | None = None,
    min_iou: float = DEFAULT_MIN_IOU,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> list[check.Check]:
    """Export a checkpoint and check the result; `output` appears only if every check passes.

    Args:
        checkpoint_file: in the layout of Meta's sam3.pt.
        dtype: FP32 or FP16, for the encoder's matrix products and outputs.
        accelerator: what runs the models; by default the GPU, if there is one.
        image_size: side of the encoder's input in pixels; the checkpoint's own by default.
        min_iou: lowest accepted mask IoU against FP32 PyTorch.
        progress: called with a description of each step.

    Raises:
        One of BAD_INPUT: nothing was written.
        One of BAD_EXPORT: the export failed its checks.
    """
    repository.check_output(output, overwrite=overwrite)
    progress("loading the checkpoint")
    model = checkpoint.load(checkpoint_file, image_size)
    exact = dtype == torch.float32
    names = EXACT_PHOTOS if exact else check.PHOTOS
    photos = check.load_photos(names, model.architecture.image_size)
    with repository.new_repository(output, overwrite=overwrite) as folder:
        path = write_repository(folder, model, dtype, accelerator, progress)
        program = torch.export.load(path)
        check_signatures(folder, program)
        checks = check.check_values(
            folder,
            program,
            model,
            photos=photos,
            min_iou=min_iou,
            exact=exact,
            fused=_fused(accelerator),
            progress=lambda photo: progress(f"checking against PyTorch: {photo}"),
        )
        if not all(c.passed for c in checks):
            raise ToleranceError(checks)
    return checks


def write_repository(
    folder: Path,
    model: InteractiveModel,
    dtype: torch.dtype,
    accelerator: Accelerator | None,
    progress: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write all files of the repository, unchecked; return the path of the decoder's program."""
    repository.copy_sources(folder, model.architecture, dtype, accelerator)
    progress("exporting the image encoder to ONNX")
    graph = folder / repository.ENCODER / "1" / "model.onnx"
    encoder = ImageEncoder(model, dtype, fused=_fused(accelerator))
    export_encoder(encoder, model.architecture.image_size, graph)
    progress("exporting the prompt decoder")
    program = folder / repository.DECODER / "1" / "decoder.pt2"
    save_decoder(export_decoder(model), program)
    return program


def _fused(accelerator: Accelerator | None) -> bool:
    """Whether the encoder's graph uses ONNX Runtime's own operators."""
    return accelerator is not Accelerator.TENSORRT
