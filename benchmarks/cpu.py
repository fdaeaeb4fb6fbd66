"""The benchmark for a machine without a GPU, at full size and at the demo's size.

Absolute seconds mean little on a CPU; what counts is the ratio of things measured alternately.
"""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks import artifacts, growth, measures
from benchmarks.artifacts import Artifacts
from benchmarks.comparison import PAUSE, Comparison
from benchmarks.figures import FigureSpec, Target
from benchmarks.findings import Findings, Progress
from benchmarks.growth import Growth
from benchmarks.stage import EMBEDDINGS, HTTP, IN_PROCESS, OURS, Stage, stage
from benchmarks.timing import Sample, ratio
from demo.model import ARCHITECTURE

ENCODE = FigureSpec(
    "full size, encode: served fp32 / Meta's code eager fp32", "ratio", Target(1.20, 1.00)
)
FASTEST = FigureSpec(
    "full size, encode: fastest exported CPU variant within the gate / Meta's code eager fp32",
    "ratio",
    Target(0.50, 0.38),
)
CLICK = FigureSpec(
    "full size, click on a kept image end to end / Meta's `predict` on a set image in process",
    "ratio",
    Target(0.90, 0.50),
)
CLICK_OR_ONE_SHOT = FigureSpec(
    "full size, click on a kept image / one-shot request with the image",
    "ratio",
    Target(1 / 200, 1 / 400),
)
BOXES = FigureSpec(
    "full size, 32 boxes in one request / 32 one-box requests", "ratio", Target(1.00, 0.70)
)
DEMO_BOXES = FigureSpec(
    "demo model, 32 boxes in one request / 32 one-box requests", "ratio", Target(0.60, 0.40)
)
SERVER_COST = FigureSpec(
    "demo model, server cost of a click beyond the decoder's own compute", "ms", Target(3.0, 1.5)
)
CROWD = FigureSpec(
    "demo model, clicks per second, 16 concurrent clickers / 1 clicker",
    "ratio",
    Target(1.5, 2.5, more_is_better=True),
)

FULL_SIZE = (ENCODE, FASTEST, CLICK, CLICK_OR_ONE_SHOT, BOXES)
DEMO = (DEMO_BOXES, SERVER_COST, CROWD)

ENCODER_ROUNDS, ENCODER_SECONDS = 5, 330.0
"""A round takes one to three minutes at full size; a slow machine runs fewer, to finish in time."""
LOAD_ROUNDS, LOAD_SECONDS = 3, 2.0
"""How often, and how long each time, each number of concurrent clickers clicks."""


def run_full_size(progress: Progress) -> Findings:
    """SAM 3 at its published size, with random weights."""
    found = Findings(progress)
    found.collect(FULL_SIZE, lambda: _full_size(found))
    return found


def run_demo_size(progress: Progress) -> Findings:
    """The small trained model, with which a server's own cost becomes visible."""
    found = Findings(progress)
    found.collect(DEMO, lambda: _demo_size(found))
    progress("demo: increasing model size")
    found.collect((), lambda: found.growths.append(_growing_models(progress)))
    return found


def _full_size(found: Findings) -> None:
    built = artifacts.full_size(progress=found.progress)
    # The other two peers would need two more copies of Meta's predictor in memory.
    with stage(built, (OURS, EMBEDDINGS, IN_PROCESS), progress=found.progress) as s:
        found.progress("full size: clicks")
        clicks = measures.clicks(s, rounds=15)
        pair = clicks[OURS], clicks[IN_PROCESS]
        found.add(CLICK.measured(ratio(*pair), _milliseconds(*pair)))
        rested = measures.clicks(s, rounds=7, pause=PAUSE)
        found.add(BOXES.measured(measures.boxes_together(s, rounds=3)))
        found.growths.append(growth.objects(s, growth.OBJECTS[:6], rounds=2))
        found.progress("full size: encoding")
        encoding = measures.encoding(s, ENCODER_ROUNDS, ENCODER_SECONDS)
        _add_encoding(found, encoding[OURS], encoding[IN_PROCESS])
    one_shot = encoding[measures.ONE_SHOT]
    first = {
        OURS: one_shot,
        EMBEDDINGS: encoding[OURS].plus(clicks[EMBEDDINGS].median),
        IN_PROCESS: encoding[IN_PROCESS].plus(clicks[IN_PROCESS].median),
    }
    found.comparisons.append(Comparison("full size", first, clicks, rested))
    click = encoding[measures.CLICK]
    note = f"{click.median * 1000:.0f} ms and {one_shot.median:.1f} s"
    found.add(CLICK_OR_ONE_SHOT.measured(ratio(click, one_shot), note))


def _add_encoding(found: Findings, ours: Sample, eager: Sample) -> None:
    share = ratio(ours, eager)
    found.add(ENCODE.measured(share, f"{ours.median:.1f} s and {eager.median:.1f} s"))
    found.add(
        FASTEST.measured(
            share, "the same sample as fp32; for narrower encoders see the section on them"
        )
    )


def _demo_size(found: Findings) -> None:
    built = artifacts.demo(progress=found.progress)
    with stage(built, progress=found.progress) as s:
        found.progress("demo: clicks")
        clicks = measures.clicks(s, rounds=30)
        rested = measures.clicks(s, rounds=15, pause=PAUSE)
        _add_server_cost(found, s)
        found.add(DEMO_BOXES.measured(measures.boxes_together(s, rounds=7)))
        found.progress("demo: first masks")
        first = measures.first_masks(s, rounds=7)
        found.comparisons.append(Comparison("demo", first, clicks, rested))
        found.progress("demo: increasing work")
        found.growths.append(growth.objects(s, growth.OBJECTS, rounds=5))
        found.growths.append(growth.batch(s, growth.BATCHES, rounds=5))
        found.growths.append(growth.photo_side(s, growth.PHOTO_SIDES, rounds=3))
        found.progress("demo: increasing the number of clickers")
        peers = [OURS, EMBEDDINGS, HTTP]
        crowds = growth.clients(s, peers, growth.CLIENTS, LOAD_ROUNDS, LOAD_SECONDS, found.progress)
        found.growths += crowds
        _add_crowd(found, crowds[0].curves[OURS])


def _add_server_cost(found: Findings, stage: Stage) -> None:
    cost = measures.server_cost(stage, blocks=9)
    note = (
        "click over gRPC, and the decoder's share of it: "
        f"{_milliseconds(cost['click'], cost['compute'])}, means of 30; a rejected click, "
        f"after a pause as long as that share: {cost['trip'].median * 1000:.1f} ms"
    )
    found.add(SERVER_COST.measured(cost["server"].scaled(1000), note))


def _add_crowd(found: Findings, rates: Mapping[int, Sample]) -> None:
    many, one = rates[16], rates[1]
    note = f"{many.median:.0f} and {one.median:.0f} clicks per second"
    found.add(CROWD.measured(ratio(many, one), note))


def _growing_models(progress: Progress) -> Growth:
    def build(side: int) -> Artifacts:
        other = None if side == ARCHITECTURE.image_size else side
        return artifacts.demo(image_size=other, progress=progress)

    return growth.model_side(build, growth.MODEL_SIDES, rounds=5)


def _milliseconds(ours: Sample, theirs: Sample) -> str:
    return f"{ours.median * 1000:.1f} ms and {theirs.median * 1000:.1f} ms"
