"""Cost as work grows: one curve for each kind of work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np

from benchmarks import load
from benchmarks.artifacts import Artifacts
from benchmarks.engine import Engine
from benchmarks.figures import markdown_table, quantity, reason
from benchmarks.stage import OURS, Stage
from benchmarks.timing import Sample, alternate, stopwatch
from demo.model import ARCHITECTURE
from triton_sam3.geometry import resize

OBJECTS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
BATCHES = [1, 2, 4, 8]
CLIENTS = [1, 4, 16, 64]
PHOTO_SIDES = [224, 448, 1024, 2048, 4096]
MODEL_SIDES = [
    windows * ARCHITECTURE.window_size * ARCHITECTURE.patch_size for windows in (1, 2, 3, 4)
]


@dataclass(frozen=True)
class Growth:
    """How a cost grows with one kind of work."""

    title: str
    work: str
    """What the horizontal axis counts."""
    unit: str
    curves: Mapping[str, Mapping[int, Sample]]

    def markdown(self) -> str:
        amounts = sorted({amount for curve in self.curves.values() for amount in curve})
        rows = [
            [name, *(_cell(curve.get(amount), self.unit) for amount in amounts)]
            for name, curve in self.curves.items()
        ]
        return markdown_table([f"{self.work} →", *map(str, amounts)], rows)


def _cell(sample: Sample | None, unit: str) -> str:
    return "—" if sample is None else quantity(sample.median, unit)


def _milliseconds(curve: Mapping[int, Sample]) -> dict[int, Sample]:
    return {amount: s.scaled(1000) for amount, s in curve.items()}


def together(title: str, work: str, seconds: Mapping[int, Sample]) -> Growth:
    """The time for several pieces of work done together, and for each of them."""
    each = {n: s.scaled(1 / n) for n, s in seconds.items()}
    curves = {"together": _milliseconds(seconds), "each": _milliseconds(each)}
    return Growth(title, work, "ms", curves)


def objects(stage: Stage, counts: list[int], rounds: int) -> Growth:
    """One request with a number of objects on a kept image, without finishing the masks."""
    kept = stage.keep_photo()
    meters = {n: stopwatch(partial(stage.wire.click, kept, objects=n)) for n in counts}
    title = f"{stage.artifacts.name}: objects in a request"
    return together(title, "objects", alternate(meters, rounds))


def batch(stage: Stage, sizes: list[int], rounds: int) -> Growth:
    """A number of images encoded in one request."""
    image = resize(stage.photo, stage.wire.side)
    meters = {n: stopwatch(partial(stage.wire.encode, np.stack([image] * n))) for n in sizes}
    title = f"{stage.artifacts.name}: images encoded together"
    return together(title, "images", alternate(meters, rounds))


def photo_side(stage: Stage, sides: list[int], rounds: int) -> Growth:
    """A first mask and a click on square photos."""
    first: dict[int, Sample] = {}
    click: dict[int, Sample] = {}
    for side in sides:
        photo = resize(stage.photo, side)
        place = (side / 2, side / 2)
        one_shot = partial(stage.ours.client.segment, photo, points=[place])
        on_kept = partial(stage.ours.open(photo), *place)
        found = alternate({"first": stopwatch(one_shot), "click": stopwatch(on_kept)}, rounds)
        first[side], click[side] = found["first"], found["click"]
    curves = {"first mask": _milliseconds(first), "click": _milliseconds(click)}
    title = f"{stage.artifacts.name}: side of the caller's square photo"
    return Growth(title, "pixels", "ms", curves)


def model_side(build: Callable[[int], Artifacts], sides: list[int], rounds: int) -> Growth:
    """The encoder and decoder without a server on a CPU, exported for several image sizes."""
    encode: dict[int, Sample] = {}
    decode: dict[int, Sample] = {}
    for side in sides:
        built = build(side)
        with Engine(built.repository, "cpu") as engine:
            found = alternate({"encode": engine.encode, "decode": engine.decode}, rounds)
        encode[side], decode[side] = found["encode"], found["decode"]
    curves = {"encode": _milliseconds(encode), "decode": _milliseconds(decode)}
    return Growth("demo: side of the model's input", "pixels", "ms", curves)


def clients(
    stage: Stage,
    names: list[str],
    counts: list[int],
    rounds: int,
    seconds: float,
    progress: Callable[[str], None],
) -> list[Growth]:
    """Clicks per second, and the latency of a click, as more people click at once.

    Each peer and number of clickers has its turn of some `seconds` in each round.

    Everyone has a different photo, so `names` must not include WHOLE: its server keeps only the
    last photo, and would answer everyone about that one.

    A peer that fails under this load gets an empty curve, and the reason is reported. Raises
    RuntimeError if ours fails.
    """
    found: dict[str, dict[int, list[load.Throughput]]] = {name: {} for name in names}
    failed: set[str] = set()
    for _, count, name in product(range(rounds), counts, names):
        if name in failed:
            continue
        try:
            turn = load.measure(stage.makers[name], stage.photo, count, seconds)
            found[name].setdefault(count, []).append(turn)
        except RuntimeError as error:
            if name == OURS:
                raise
            progress(f"{name}, concurrent clickers: not measured, {reason(error)}")
            failed.add(name)
            found[name].clear()
    rates = {
        name: {n: Sample(tuple(t.per_second for t in turns)) for n, turns in curve.items()}
        for name, curve in found.items()
    }
    latencies = {
        name: _milliseconds({n: _joined(turns) for n, turns in curve.items()})
        for name, curve in found.items()
    }
    model = stage.artifacts.name
    return [
        Growth(f"{model}: clicks per second, all clickers together", "clickers", "1/s", rates),
        Growth(f"{model}: latency of a click", "clickers", "ms", latencies),
    ]


def _joined(turns: Sequence[load.Throughput]) -> Sample:
    return Sample(tuple(seconds for turn in turns for seconds in turn.latency.values))
