"""The benchmark of a machine without a GPU, at full size and at the demo's.

Absolute seconds mean little on a CPU; what counts are ratios of things measured in turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import artifacts, growth, measures
from benchmarks.artifacts import Artifacts
from benchmarks.comparison import PAUSE, Comparison
from benchmarks.figures import Asked, Figure, Target, reason
from benchmarks.growth import Growth
from benchmarks.stage import EMBEDDINGS, HTTP, IN_PROCESS, OURS, PEERS, WHOLE, Stage, stage
from benchmarks.timing import Sample, ratio

Progress = Callable[[str], None]

ENCODE = Asked(
    "full size, encode: served fp32 / Meta's code eager fp32", "ratio", Target(1.20, 1.00)
)
FASTEST = Asked(
    "full size, encode: fastest exported CPU variant within the gate / Meta's code eager fp32",
    "ratio",
    Target(0.50, 0.38),
)
CLICK = Asked(
    "full size, click on a kept image end to end / Meta's `predict` on a set image in process",
    "ratio",
    Target(0.90, 0.50),
)
CLICK_OR_ONE_SHOT = Asked(
    "full size, click on a kept image / one-shot request with the image",
    "ratio",
    Target(1 / 200, 1 / 400),
)
BOXES = Asked(
    "full size, 32 boxes in one request / 32 one-box requests", "ratio", Target(1.00, 0.70)
)
DEMO_BOXES = Asked(
    "demo model, 32 boxes in one request / 32 one-box requests", "ratio", Target(0.60, 0.40)
)
SERVER_COST = Asked(
    "demo model, server cost of a click beyond the decoder's own compute", "ms", Target(3.0, 1.5)
)
CROWD = Asked(
    "demo model, clicks per second, 16 concurrent clickers / 1 clicker",
    "ratio",
    Target(1.5, 2.5, more_is_better=True),
)

FULL_SIZE = (ENCODE, FASTEST, CLICK, CLICK_OR_ONE_SHOT, BOXES)
DEMO = (DEMO_BOXES, SERVER_COST, CROWD)

ENCODER_ROUNDS = 5
"""Of about a minute each at full size."""
LOAD_SECONDS = 4.0
"""How long each number of concurrent clickers clicks."""


@dataclass(frozen=True)
class Outcome:
    """All that one run of the benchmark found."""

    figures: list[Figure]
    comparison: Comparison
    growth: list[Growth] = field(default_factory=list)


def run(progress: Progress) -> tuple[list[Outcome], list[Figure]]:
    """Both sizes; also the figures of all, those of a size that cannot be run with the reason."""
    outcomes: list[Outcome] = []
    figures: list[Figure] = []
    for measure, asked in ((run_full_size, FULL_SIZE), (run_demo_size, DEMO)):
        try:
            outcomes.append(measure(progress))
            figures += outcomes[-1].figures
        except Exception as error:  # one size's figures are wanted without the other's
            figures += [one.missing(reason(error)) for one in asked]
    return outcomes, figures


def run_full_size(progress: Progress) -> Outcome:
    """SAM 3's published size, random weights."""
    built = artifacts.full_size(progress=progress)
    # The other two servers would hold two more copies of Meta's predictor in memory.
    names = (OURS, EMBEDDINGS, IN_PROCESS)
    with _staged(built, names, progress) as s:
        progress("full size: clicks")
        clicks = measures.clicks(s, rounds=15)
        rested = measures.clicks(s, rounds=7, pause=PAUSE)
        boxes = measures.boxes_together(s, rounds=3)
        objects = growth.objects(s, growth.OBJECTS[:6], rounds=2)
        progress(f"full size: encoding, {ENCODER_ROUNDS} rounds")
        encoding = measures.encoding(s, ENCODER_ROUNDS, warmup=0)
        progress(f"full size: one-shot requests, {ENCODER_ROUNDS} rounds")
        one_shot = measures.one_shot(s, ENCODER_ROUNDS)
    first = {
        name: Sample(tuple(seconds + clicks[name].median for seconds in sample.values))
        for name, sample in encoding.items()
    }
    shares = Sample(tuple(clicks[OURS].median / seconds for seconds in one_shot.values))
    figures = [
        ENCODE.measured(
            ratio(encoding[OURS], encoding[IN_PROCESS]),
            f"{encoding[OURS].median:.1f} s and {encoding[IN_PROCESS].median:.1f} s",
        ),
        FASTEST.measured(
            ratio(encoding[OURS], encoding[IN_PROCESS]),
            "fp32's sample; what narrower encoders would be: see the section of theirs",
        ),
        CLICK.measured(
            ratio(clicks[OURS], clicks[IN_PROCESS]),
            _milliseconds(clicks[OURS], clicks[IN_PROCESS]),
        ),
        CLICK_OR_ONE_SHOT.measured(
            shares, f"{clicks[OURS].median * 1000:.0f} ms and {one_shot.median:.1f} s"
        ),
        BOXES.measured(boxes),
    ]
    return Outcome(figures, Comparison("full size", first, clicks, rested), [objects])


def run_demo_size(progress: Progress) -> Outcome:
    """The small trained model, where a server's own cost shows."""
    built = artifacts.demo(progress=progress)
    with _staged(built, PEERS, progress) as s:
        progress("demo: clicks")
        clicks = measures.clicks(s, rounds=30)
        rested = measures.clicks(s, rounds=15, pause=PAUSE)
        cost = measures.server_cost(s, rounds=60)
        boxes = measures.boxes_together(s, rounds=7)
        progress("demo: first masks")
        first = measures.first_masks(s, rounds=7)
        progress("demo: growing work")
        curves = [
            growth.objects(s, growth.OBJECTS, rounds=5),
            growth.batch(s, growth.BATCHES, rounds=5),
            growth.photo_side(s, growth.PHOTO_SIDES, rounds=3),
        ]
        progress("demo: growing crowds")
        crowds = growth.clients(s, [OURS, EMBEDDINGS, WHOLE, HTTP], growth.CLIENTS, LOAD_SECONDS)
    progress("demo: growing models")
    curves.append(
        growth.model_side(
            lambda side: artifacts.demo(image_size=side, progress=progress),
            growth.MODEL_SIDES,
            rounds=5,
            device="cpu",
        )
    )
    rates = crowds[0].curves[OURS]
    figures = [
        DEMO_BOXES.measured(boxes),
        SERVER_COST.measured(
            cost["server"].scaled(1000),
            "click over gRPC, decoder alone: " + _milliseconds(cost["click"], cost["compute"]),
        ),
        CROWD.measured(
            Sample((rates[16].median / rates[1].median,)),
            f"{rates[16].median:.0f} and {rates[1].median:.0f} clicks per second",
        ),
    ]
    return Outcome(figures, Comparison("demo", first, clicks, rested), [*curves, *crowds])


def _milliseconds(ours: Sample, theirs: Sample) -> str:
    return f"{ours.median * 1000:.1f} ms and {theirs.median * 1000:.1f} ms"


@contextmanager
def _staged(built: Artifacts, names: Sequence[str], progress: Progress) -> Iterator[Stage]:
    with (
        TemporaryDirectory(prefix="triton-sam3-bench-") as folder,
        stage(built, names, work_dir=Path(folder), progress=progress) as everything,
    ):
        yield everything
