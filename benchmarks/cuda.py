"""The benchmark for a machine with an NVIDIA GPU: full size, 16 bits, correctness first.

What a machine lacks (a Triton server, ONNX Runtime with CUDA) costs only its own figures: they are
listed as not measured, with the reason. Each figure is reported as soon as it is measured, and the
two parts run separately, so that nothing is lost on a machine that is available for minutes only.
`benchmarks.offline` brings everything to a machine without a network.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial

import torch

from benchmarks import artifacts, growth, measures
from benchmarks.accuracy import GATE_RANDOM, GATE_TRAINED
from benchmarks.artifacts import Artifacts
from benchmarks.comparison import PAUSE, Comparison
from benchmarks.engine import Engine
from benchmarks.figures import FigureSpec, Target
from benchmarks.findings import Findings, Progress
from benchmarks.stage import OURS, Stage, stage
from benchmarks.timing import Meter, Sample, alternate
from export.accelerator import Accelerator

DEVICE = "cuda"
MILLISECONDS = 1000
BUDGET_BYTES = 80e9
ENCODERS: dict[str, Accelerator | None] = {
    "onnxruntime": None,
    "tensorrt": Accelerator.TENSORRT,
    "pytorch": None,
}
"""The runtimes for the encoder without a server, and the accelerator each graph is exported for."""

DEMO_ACCURACY = FigureSpec(
    "demo model, worst mask IoU of the 16-bit encoder against fp32",
    "",
    Target(GATE_TRAINED, 1.0, more_is_better=True),
)
ACCURACY = FigureSpec(
    "full size, worst mask IoU of the 16-bit encoder against fp32, random weights",
    "",
    Target(GATE_RANDOM, 1.0, more_is_better=True),
)
ENCODE = FigureSpec("encode one image, GPU time p50, 16-bit", "ms", Target(12, 10))
SATURATION = FigureSpec(
    "images per second per GPU at saturation", "1/s", Target(85, 100, more_is_better=True)
)
CLICK_P50 = FigureSpec(
    "click on a kept image, end to end, gRPC same host, p50", "ms", Target(2, 1.2)
)
CLICK_P99 = FigureSpec("click on a kept image, end to end, gRPC same host, p99", "ms", Target(5, 3))
DECODE = FigureSpec("click in process, without a server, p50", "ms")
CLICKS = FigureSpec(
    "clicks per second per GPU, served", "1/s", Target(2_000, 8_000, more_is_better=True)
)
DECODES = FigureSpec("clicks per second per GPU, in process, without a server", "1/s")
MEMORY = FigureSpec("kept images in 80 GB", "images", Target(7_000, 7_500, more_is_better=True))
ENCODER_FIGURES = (ENCODE, SATURATION)
IN_PROCESS_FIGURES = {
    "onnxruntime": (ACCURACY, *ENCODER_FIGURES, DECODE, DECODES, MEMORY),
    "tensorrt": (ACCURACY, *ENCODER_FIGURES),
    "pytorch": ENCODER_FIGURES,  # a peer: the same network without a server's runtime
}
"""By the encoder's runtime; the decoder is the same for all."""
SERVED_FIGURES = (CLICK_P50, CLICK_P99, CLICKS)

TOGETHER = [1, 2, 4, 8, 16, 32, 64]
"""Numbers of clicks, each on a different image, that reach the decoder at once."""
KEPT = 256
"""Images whose memory is measured: many times what the allocator reserves at once."""
CROWDS = [1, 16, 64]
CROWD_SECONDS = 4.0
AGREEMENT = 0.0
"""Minimum mask IoU of the peers: reported, not required. With random weights the best of three
candidates depends on the scores' last digits. Our accuracy has a figure of its own."""
TENSORRT_LIBRARIES = ("libnvinfer.so.10", "libnvinfer.so.11")


def run_in_process(progress: Progress) -> Findings:
    """Build from seeds, check, and time the encoder and decoder without a server."""
    found = Findings(progress)
    found.collect([DEMO_ACCURACY], lambda: _demo_accuracy(found))
    for encoder, accelerator in ENCODERS.items():
        specs = [_by(encoder, one) for one in IN_PROCESS_FIGURES[encoder]]
        graphs = partial(artifacts.full_size, torch.float16, progress, accelerator)
        found.collect(specs, partial(_in_process, graphs, encoder, found))
    return found


def run_served(progress: Progress) -> Findings:
    """Clicks through Triton, compared with the peers."""
    found = Findings(progress)
    found.collect(SERVED_FIGURES, lambda: _served(found))
    return found


def _require_gpu() -> None:
    if not torch.cuda.is_available():
        raise RuntimeError("this machine has no NVIDIA GPU")


def _by(encoder: str, spec: FigureSpec) -> FigureSpec:
    return FigureSpec(f"{spec.name} ({encoder})", spec.unit, spec.target)


def _demo_accuracy(found: Findings) -> None:
    _require_gpu()
    found.progress("demo: checking the 16-bit encoder")
    built = artifacts.demo(torch.float16, progress=found.progress)
    with _engine(built, "onnxruntime") as engine:
        found.add(DEMO_ACCURACY.measured(Sample((engine.mask_iou(),))))


def _in_process(graphs: Callable[[], Artifacts], encoder: str, found: Findings) -> None:
    """Time the encoder and decoder without a server: what the GPU itself can do."""
    _require_gpu()
    if encoder == Accelerator.TENSORRT.value:
        _load_tensorrt()
    specs = IN_PROCESS_FIGURES[encoder]
    with _engine(graphs(), encoder) as engine:
        if ACCURACY in specs:
            found.progress(f"{encoder}: checking the 16-bit encoder")
            found.add(_by(encoder, ACCURACY).measured(Sample((engine.mask_iou(),))))
        found.progress(f"{encoder}: timing")
        batches = {n: _repeat(partial(engine.encode, batch=n), 20) for n in growth.BATCHES}
        found.add(_by(encoder, ENCODE).measured(batches[1].scaled(MILLISECONDS)))
        found.add(_by(encoder, SATURATION).measured(_best_rate(batches)))
        title = f"{encoder}: images encoded together"
        found.growths.append(growth.together(title, "images", batches))
        if DECODE in specs:
            _decoder(engine, encoder, found)


def _decoder(engine: Engine, encoder: str, found: Findings) -> None:
    decodes = {n: _repeat(partial(engine.decode, images=n), 100) for n in TOGETHER}
    found.add(_by(encoder, DECODE).measured(decodes[1].scaled(MILLISECONDS)))
    found.add(_by(encoder, DECODES).measured(_best_rate(decodes)))
    each = engine.keep(images=KEPT) / KEPT
    note = f"{each / 2**20:.1f} MiB each, not counting the model"
    found.add(_by(encoder, MEMORY).measured(Sample((BUDGET_BYTES // each,)), note))
    found.growths.append(growth.together("clicks decoded together", "images", decodes))


def _load_tensorrt() -> None:
    """Check for TensorRT before spending minutes on its graph. Raises RuntimeError."""
    for name in TENSORRT_LIBRARIES:
        try:
            ctypes.CDLL(name)
            return
        except OSError:
            continue
    raise RuntimeError(f"this machine has no TensorRT ({' or '.join(TENSORRT_LIBRARIES)})")


def _served(found: Findings) -> None:
    _require_gpu()
    built = artifacts.full_size(torch.float16, progress=found.progress)
    with stage(built, device=DEVICE, progress=found.progress, agreement=AGREEMENT) as s:
        _crowds(s, found)
        _compare(s, found)


def _crowds(s: Stage, found: Findings) -> None:
    """Time clicks from callers in separate processes: one caller, then more."""
    found.progress("increasing the number of clickers")
    rates, latencies = growth.clients(s, [OURS], CROWDS, 1, CROWD_SECONDS, found.progress)
    found.growths += [rates, latencies]
    alone = latencies.curves[OURS][1]
    agreement = ", ".join(f"{name} {iou:.3f}" for name, iou in s.agreement.items())
    found.add(CLICK_P50.measured(alone, f"mask IoU with Meta's predictor's: {agreement}"))
    found.add(CLICK_P99.measured(Sample((alone.percentile(99),))))
    most = max(rate.median for rate in rates.curves[OURS].values())
    found.add(CLICKS.measured(Sample((most,))))


def _compare(s: Stage, found: Findings) -> None:
    """Time all peers alternately, from one process."""
    found.progress("clicks, alternating between peers")
    clicks = measures.clicks(s, rounds=100)
    rested = measures.clicks(s, rounds=10, pause=PAUSE)
    first = measures.first_masks(s, rounds=10)
    found.comparisons.append(Comparison("full size", first, clicks, rested))
    found.progress("increasing the number of objects")
    found.growths.append(growth.objects(s, growth.OBJECTS, rounds=10))


def _engine(built: Artifacts, encoder: str) -> Engine:
    return Engine(built.repository, DEVICE, encoder=encoder, checkpoint=built.checkpoint)


def _repeat(meter: Meter, times: int) -> Sample:
    return alternate({"": meter}, times, warmup=max(3, times // 10))[""]


def _best_rate(samples: dict[int, Sample]) -> Sample:
    """The rate per second, at the amount with the highest."""
    amount = max(samples, key=lambda n: n / samples[n].median)
    return Sample(tuple(amount / seconds for seconds in samples[amount].values))
