"""python -m benchmarks: measure our server and its peers in one run, and rewrite RESULTS.md."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from benchmarks import anatomy, artifacts, cpu, cuda, pages
from benchmarks.anatomy import Anatomy
from benchmarks.environment import Provenance, provenance
from benchmarks.figures import rich_table
from benchmarks.findings import Findings
from benchmarks.stage import PLACE, load_photo
from export.interruption import unwind_on_signals

console = Console(highlight=False, log_path=False)


class Device(str, Enum):
    """Where models run."""

    CPU = "cpu"
    CUDA = "cuda"


class Part(str, Enum):
    """A part of the benchmark."""

    FULL_SIZE = "full-size"
    DEMO = "demo"
    ANATOMY = "anatomy"
    IN_PROCESS = "in-process"
    SERVED = "served"


CPU_PARTS = {Part.FULL_SIZE: cpu.run_full_size, Part.DEMO: cpu.run_demo_size}
CUDA_PARTS = {Part.IN_PROCESS: cuda.run_in_process, Part.SERVED: cuda.run_served}


def main(
    device: Annotated[Device, typer.Option(help="Where models run.")] = Device.CPU,
    only: Annotated[
        Part | None,
        typer.Option(
            help="Run one part: full-size, demo or anatomy on a CPU, shown but not written; "
            "in-process or served on a GPU."
        ),
    ] = None,
    write: Annotated[bool, typer.Option(help="Rewrite RESULTS.md's sections.")] = True,
) -> None:
    """Measure our server and its peers in one run, and rewrite benchmarks/RESULTS.md."""
    unwind_on_signals()
    if only and (only in CUDA_PARTS) != (device is Device.CUDA):
        raise typer.BadParameter(f"{only.value} is not part of the benchmark on {device.value}")
    if device is Device.CUDA:
        for part in [only] if only else CUDA_PARTS:
            _cuda(part, write)
    elif only:
        _part(only)
    else:
        _cpu(write)


def _progress(step: str) -> None:
    console.log(escape(step))


def _cpu(write: bool) -> None:
    origin = provenance("make bench")
    found = [measure(_progress) for measure in CPU_PARTS.values()]
    _report("cpu", found, origin, write)
    anatomies = _dissect()
    if write:
        pages.publish_anatomy("cpu", anatomies, origin)


def _cuda(part: Part, write: bool) -> None:
    origin = provenance(f"python -m benchmarks --device cuda --only {part.value}")
    _report(f"cuda-{part.value}", [CUDA_PARTS[part](_progress)], origin, write)


def _report(run: str, found: Sequence[Findings], origin: Provenance, write: bool) -> None:
    figures = [figure for part in found for figure in part.figures]
    comparisons = [comparison for part in found for comparison in part.comparisons]
    growths = [growth for part in found for growth in part.growths]
    console.print(rich_table("measured in this run", figures))
    if not write:
        return
    pages.publish_figures(run, figures, origin)
    if comparisons:
        pages.publish_comparison(run, comparisons, origin)
    if growths:
        pages.publish_growth(run, growths, origin)


def _part(part: Part) -> None:
    if part is Part.ANATOMY:
        for dissected in _dissect():
            console.print(dissected.table())
        return
    found = CPU_PARTS[part](_progress)
    console.print(rich_table("measured in this run", found.figures))
    for comparison in found.comparisons:
        console.print(comparison.markdown(), markup=False)
    for growth in found.growths:
        console.print(f"\n{growth.title} ({growth.unit})\n{growth.markdown()}", markup=False)


def _dissect() -> list[Anatomy]:
    _progress("demo: where a request's time goes")
    repository = artifacts.demo(progress=_progress).repository
    with TemporaryDirectory(prefix="triton-sam3-bench-") as folder:
        return anatomy.dissect(repository, load_photo(), PLACE, Path(folder))


if __name__ == "__main__":
    typer.run(main)
