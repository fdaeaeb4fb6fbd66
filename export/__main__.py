"""python -m export: checkpoint → a complete Triton model repository, checked.

Exit status: 0 exported and within tolerance; 1 out of tolerance, nothing written; 2 bad input.
"""

from __future__ import annotations

import logging
import shlex
import sys
import threading
import warnings
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

# sam3 and the exporters warn about their own code, which users cannot change.
warnings.filterwarnings("ignore")
logging.getLogger("torch.onnx").setLevel(logging.ERROR)

try:
    import torch

    from export.accelerator import Accelerator
    from export.check import Check
    from export.interruption import unwind_on_signals
    from export.pipeline import BAD_INPUT, DEFAULT_MIN_IOU, ToleranceError, export_repository
    from export.signatures import SignatureError
except ModuleNotFoundError as missing:
    print(
        f"error: the module {missing.name} is missing: pip install '.[export]', on Linux "
        "(sam3 needs triton, which torch installs only there)",
        file=sys.stderr,
    )
    sys.exit(2)
except RuntimeError as mismatch:  # torchvision has operators that this torch lacks
    print(
        f"error: torch and torchvision do not match ({mismatch}); install both from the same index",
        file=sys.stderr,
    )
    sys.exit(2)


class Precision(str, Enum):
    """Type of the encoder's matrix products and outputs."""

    FP32 = "fp32"
    FP16 = "fp16"


DTYPES = {Precision.FP32: torch.float32, Precision.FP16: torch.float16}
IN_FP32 = {
    Precision.FP32: "everything",
    Precision.FP16: "at least the patch projection, sums in layer norms and the decoder",
}
"""What every graph of a precision computes in FP32; the rest depends on sizes and operators (see
export/encoder.py)."""

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


def main(
    checkpoint: Annotated[Path, typer.Option(help="SAM 3 checkpoint in Meta's layout (sam3.pt).")],
    output: Annotated[Path, typer.Option(help="Folder to create: the model repository.")],
    precision: Annotated[
        Precision, typer.Option(help="Type of the encoder's matrix products and outputs.")
    ] = Precision.FP32,
    accelerator: Annotated[
        Accelerator | None,
        typer.Option(help="What runs the models; by default the GPU, if there is one."),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(help="Side of the encoder's input in pixels; the checkpoint's by default."),
    ] = None,
    min_iou: Annotated[
        float, typer.Option(help="Lowest accepted mask IoU against FP32 PyTorch.")
    ] = DEFAULT_MIN_IOU,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing model repository.")
    ] = False,
) -> None:
    """Export SAM 3's interactive head as a Triton model repository, and check it."""
    if threading.current_thread() is threading.main_thread():
        unwind_on_signals()
    try:
        with _StepProgress() as progress:
            checks = export_repository(
                checkpoint,
                output,
                dtype=DTYPES[precision],
                accelerator=accelerator,
                image_size=image_size,
                min_iou=min_iou,
                overwrite=overwrite,
                progress=progress,
            )
    except BAD_INPUT as error:
        raise _failure(error, 2) from error
    except ToleranceError as error:
        _print(error.checks)
        raise _failure(f"{error}; {output} was not written", 1) from error
    except SignatureError as error:
        raise _failure(error, 1) from error
    _print(checks)
    console.print(f"{output}: {precision.value}, in FP32: {IN_FP32[precision]}", markup=False)
    console.print(f"next: python -m server {shlex.quote(str(output))}", markup=False)


class _StepProgress:
    """A line for each step with a spinner and its time; finished lines stay."""

    def __init__(self) -> None:
        self._bar = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=errors,
        )
        self._task: TaskID | None = None

    def __call__(self, step: str) -> None:
        self._finish()
        self._task = self._bar.add_task(step, total=1)

    def _finish(self) -> None:
        if self._task is not None:
            self._bar.update(self._task, completed=1)

    def __enter__(self) -> _StepProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._finish()
        self._bar.stop()


def _print(checks: list[Check]) -> None:
    table = Table("against PyTorch", "measured", "allowed", "")
    for check in checks:
        allowed = f"{'≥' if check.at_least else '≤'} {check.limit:g}"
        measured = f"{check.value:.5f}" if check.at_least else f"{check.value:.1e}"
        table.add_row(check.name, measured, allowed, "ok" if check.passed else "FAILED")
    console.print(table)


def _failure(message: object, status: int) -> typer.Exit:
    errors.print(f"error: {message}", markup=False)
    return typer.Exit(status)


if __name__ == "__main__":
    typer.run(main)
