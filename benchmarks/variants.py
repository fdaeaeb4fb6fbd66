"""python -m benchmarks.variants: narrower encoders on a CPU, and what they cost in mask quality.

The demo model's weights are trained, so its masks show how rounding affects real ones. A variant
within the gate may be served; the others are listed with the time they would save.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

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
ROUNDS = 30
PAUSE = 0.05
"""Seconds before each reading: one library's threads still spin when it is another's turn. Without
it FP16 appeared to take 0.68 of FP32's time; next to FP32 alone it takes 1.03 to 1.06."""
HEADER = ("encoder", "worst mask IoU", f"gate, {GATE_TRAINED}", "time / fp32")

Run = Callable[[NDArray[np.uint8]], Features]
"""UINT8 RGB [S, S, 3] → the three embeddings."""


def _graph(built: artifacts.Artifacts) -> Path:
    return built.repository / ENCODER / "1" / "model.onnx"


def onnxruntime(path: Path) -> Run:
    session = ort.InferenceSession(path)
    return lambda image: check.run_encoder(session, image)


def fp32(_: Path) -> Run:
    return onnxruntime(_graph(artifacts.demo()))


def fp16(_: Path) -> Run:
    return onnxruntime(_graph(artifacts.demo(torch.float16)))


def int8(folder: Path) -> Run:
    """Weights per channel; activations per tensor, at run time."""
    path = folder / "int8.onnx"
    quantize_dynamic(
        _graph(artifacts.demo()),
        path,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QInt8,
    )
    return onnxruntime(path)


def int8_blocks(folder: Path) -> Run:
    """Weights and activations in blocks of 32, each with its own scale."""
    path = folder / "int8-blocks.onnx"
    options = {"bits": 8, "block_size": 32, "is_symmetric": True, "accuracy_level": 4}
    quantizer = MatMulNBitsQuantizer(str(_graph(artifacts.demo())), **options)
    quantizer.process()
    quantizer.model.save_model_to_file(str(path))
    return onnxruntime(path)


def openvino_bf16(_: Path) -> Run:
    """`pip install openvino`. It has no ONNX Runtime operators, so it gets the TensorRT graph."""
    import openvino  # noqa: PLC0415 - optional

    graph = _graph(artifacts.demo(accelerator=Accelerator.TENSORRT))
    options = {"INFERENCE_PRECISION_HINT": "bf16"}
    compiled = openvino.Core().compile_model(str(graph), "CPU", options)

    def run(image: NDArray[np.uint8]) -> Features:
        found = compiled({"image": image[None]})
        first, second, third = (torch.from_numpy(np.array(found[name])) for name in FEATURES)
        return first, second, third

    return run


REFERENCE = "fp32, as served"
VARIANTS: dict[str, Callable[[Path], Run]] = {
    REFERENCE: fp32,
    "fp16, as exported for GPUs": fp16,
    "INT8, ONNX Runtime's dynamic quantization": int8,
    "INT8 in blocks of 32, ONNX Runtime's MatMulNBits": int8_blocks,
    "bf16, OpenVINO": openvino_bf16,
}


def measure(folder: Path) -> list[tuple[str, ...]]:
    """A row per variant; one that this machine cannot run says why."""
    runs: dict[str, Run] = {}
    missing: dict[str, str] = {}
    for name, make in VARIANTS.items():
        try:
            runs[name] = make(folder)
        except Exception as error:  # carry on with the others
            missing[name] = reason(error)
    ious, times = _worst_ious(runs), _times(runs)
    rows: list[tuple[str, ...]] = []
    for name in VARIANTS:
        if name in missing:
            rows.append((name, "not measured", missing[name], ""))
            continue
        verdict = "within" if ious[name] >= GATE_TRAINED else "missed"
        shown = quantity(ratio(times[name], times[REFERENCE]).median, "ratio")
        rows.append((name, f"{ious[name]:.4f}", verdict, shown))
    return rows


def _worst_ious(runs: dict[str, Run]) -> dict[str, float]:
    model = load(artifacts.DEMO_CHECKPOINT)
    worst = dict.fromkeys(runs, 1.0)
    for photo in check.PHOTOS:
        image = check.load_photo(photo, model.architecture.image_size)
        reference = check.encode_reference(model, image)
        for name, run in runs.items():
            worst[name] = min(worst[name], worst_mask_iou(model, run(image), reference))
    return worst


def _times(runs: dict[str, Run]) -> dict[str, Sample]:
    side = load(artifacts.DEMO_CHECKPOINT).architecture.image_size
    image = check.load_photo(check.PHOTOS[0], side)
    meters = {name: stopwatch(partial(run, image)) for name, run in runs.items()}
    return alternate(meters, ROUNDS, pause=PAUSE)


def main(
    write: Annotated[bool, typer.Option(help="Rewrite the results page's section.")] = True,
) -> None:
    """Measure narrower encoders of the demo model on this CPU."""
    logging.disable(logging.WARNING)  # the quantizer and the exporter log every node
    origin = provenance("python -m benchmarks.variants").markdown()
    with TemporaryDirectory(prefix="triton-sam3-variants-") as folder:
        table = markdown_table(HEADER, measure(Path(folder)))
    Console(highlight=False, soft_wrap=True).print(table, markup=False)
    if write:
        text = (
            "Worst mask IoU against Meta's modules in FP32, over prompts of every kind on "
            f"{len(check.PHOTOS)} photos, with the demo model's trained weights; time for one "
            "image relative to FP32, measured alternately. What misses the gate is not exported."
        )
        write_section(SECTION, f"## Narrower encoders on a CPU\n\n{origin}\n\n{text}\n\n{table}")


if __name__ == "__main__":
    typer.run(main)
