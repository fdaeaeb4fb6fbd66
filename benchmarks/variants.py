"""python -m benchmarks.variants: narrower encoders on a CPU, and what they cost in mask quality.

The demo model's weights are trained, so its masks show how rounding affects real ones. A variant
within the gate may be served; the others are listed with the time they would save.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Protocol

import numpy as np
import onnxruntime as ort
import torch
import typer
from numpy.typing import NDArray
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from rich.console import Console

from benchmarks import artifacts
from benchmarks.accuracy import GATE_TRAINED, worst_mask_iou
from benchmarks.environment import provenance
from benchmarks.figures import markdown_table, quantity, reason
from benchmarks.results import write_section
from benchmarks.timing import Sample, alternate, ratio, stopwatch
from export import check
from export.accelerator import Accelerator
from export.check import Features
from export.checkpoint import load
from export.encoder import FEATURES
from export.repository import ENCODER

SECTION = "cpu-variants"
ROUNDS, FULL_SIZE_ROUNDS = 30, 3
PAUSE = 0.05
"""Seconds before each reading: one library's threads still spin when it is another's turn. Without
it FP16 appeared to be a third faster than FP32, which it is not."""
HEADER = (
    "encoder",
    "worst mask IoU",
    f"gate, {GATE_TRAINED}",
    "time / fp32, demo",
    "time / fp32, full size",
)

Run = Callable[[NDArray[np.uint8]], Features]
"""UINT8 RGB [S, S, 3] → the three embeddings."""


class Build(Protocol):
    """`artifacts.demo` or `artifacts.full_size`."""

    def __call__(
        self, dtype: torch.dtype = ..., *, accelerator: Accelerator | None = ...
    ) -> artifacts.Artifacts: ...


def _graph(built: artifacts.Artifacts) -> Path:
    return built.repository / ENCODER / "1" / "model.onnx"


def onnxruntime(path: Path) -> Run:
    session = ort.InferenceSession(path)
    return lambda image: check.run_encoder(session, image)


def fp32(build: Build, _: Path) -> Run:
    return onnxruntime(_graph(build()))


def fp16(build: Build, _: Path) -> Run:
    return onnxruntime(_graph(build(torch.float16)))


def int8(build: Build, folder: Path) -> Run:
    """Weights per channel; activations per tensor, at run time."""
    path = folder / "int8.onnx"
    quantize_dynamic(
        _graph(build()),
        path,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
    )
    return onnxruntime(path)


def int8_blocks(build: Build, folder: Path) -> Run:
    """Weights and activations in blocks of 32, each with its own scale."""
    path = folder / "int8-blocks.onnx"
    options = {"bits": 8, "block_size": 32, "is_symmetric": True, "accuracy_level": 4}
    quantizer = MatMulNBitsQuantizer(str(_graph(build())), **options)
    quantizer.process()
    quantizer.model.save_model_to_file(str(path), use_external_data_format=True)
    return onnxruntime(path)


def openvino_bf16(build: Build, _: Path) -> Run:
    """`pip install openvino`. It has no ONNX Runtime operators, so it gets the TensorRT graph."""
    import openvino  # noqa: PLC0415 - optional

    graph = _graph(build(accelerator=Accelerator.TENSORRT))
    options = {"INFERENCE_PRECISION_HINT": "bf16"}
    compiled = openvino.Core().compile_model(str(graph), "CPU", options)

    def run(image: NDArray[np.uint8]) -> Features:
        found = compiled({"image": image[None]})
        first, second, third = (torch.from_numpy(np.array(found[name])) for name in FEATURES)
        return first, second, third

    return run


Variant = Callable[[Build, Path], Run]
"""Makes an encoder from what `Build` exports; it may write to the folder."""

REFERENCE = "fp32, as served"
VARIANTS: dict[str, Variant] = {
    REFERENCE: fp32,
    "fp16, as exported for GPUs": fp16,
    "INT8, ONNX Runtime's dynamic quantization": int8,
    "INT8 in blocks of 32, ONNX Runtime's MatMulNBits": int8_blocks,
    "bf16, OpenVINO": openvino_bf16,
}


def measure() -> list[tuple[str, ...]]:
    """A row per variant; one that this machine cannot run says why."""
    return [_row(name, variant) for name, variant in VARIANTS.items()]


def _row(name: str, variant: Variant) -> tuple[str, ...]:
    try:
        worst = _worst_iou(variant)
    except Exception as error:  # carry on with the others
        return (name, "not measured", reason(error), "", "")
    verdict = "within" if worst >= GATE_TRAINED else "missed"
    sizes = ((artifacts.demo, ROUNDS), (artifacts.full_size, FULL_SIZE_ROUNDS))
    return (name, f"{worst:.4f}", verdict, *(_time(variant, *size) for size in sizes))


def _worst_iou(variant: Variant) -> float:
    model, worst = load(artifacts.DEMO_CHECKPOINT), 1.0
    with _made(variant, artifacts.demo) as run:
        for photo in check.PHOTOS:
            image = check.load_photo(photo, model.architecture.image_size)
            reference = check.encode_reference(model, image)
            worst = min(worst, worst_mask_iou(model, run(image), reference))
    return worst


def _time(variant: Variant, build: Build, rounds: int) -> str:
    """The variant's time for one image by FP32's, or why it was not measured."""
    try:
        return quantity(_share(variant, build, rounds).median, "ratio")
    except Exception as error:  # such as for want of memory
        return reason(error)


def _share(variant: Variant, build: Build, rounds: int) -> Sample:
    with _made(fp32, build) as reference, _made(variant, build) as run:
        side = load(build().checkpoint).architecture.image_size
        image = check.load_photo(check.PHOTOS[0], side)
        meters = {run: stopwatch(partial(run, image)) for run in (reference, run)}
        times = alternate(meters, rounds, pause=PAUSE)
    return ratio(times[run], times[reference])


@contextmanager
def _made(variant: Variant, build: Build) -> Iterator[Run]:
    with TemporaryDirectory(prefix="triton-sam3-variants-") as folder:
        yield variant(build, Path(folder))


def main(
    write: Annotated[bool, typer.Option(help="Rewrite the results page's section.")] = True,
) -> None:
    """Measure narrower encoders on this CPU."""
    logging.disable(logging.WARNING)  # the quantizer and the exporter log every node
    origin = provenance("python -m benchmarks.variants").markdown()
    table = markdown_table(HEADER, measure())
    Console(highlight=False, soft_wrap=True).print(table, markup=False)
    if write:
        text = (
            "Worst mask IoU against Meta's modules in FP32, over prompts of every kind on "
            f"{len(check.PHOTOS)} photos, with the demo model's trained weights; time for one "
            "image relative to FP32, read alternately. What misses the gate is not exported."
        )
        write_section(SECTION, f"## Narrower encoders on a CPU\n\n{origin}\n\n{text}\n\n{table}")


if __name__ == "__main__":
    typer.run(main)
