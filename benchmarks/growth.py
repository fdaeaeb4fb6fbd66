"""Cost as work grows: one curve for each kind of work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks import artifacts, measures
from benchmarks.engine import Engine
from benchmarks.figures import markdown_table, quantity, reason
from benchmarks.load import Throughput
from benchmarks.stage import OURS, Stage
from benchmarks.timing import Sample, alternate

OBJECTS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
BATCHES = [1, 2, 4, 8]
CLIENTS = [1, 4, 16, 64]
PHOTO_SIDES = [224, 448, 1024, 2048, 4096]
MODEL_SIDES = [112, 224, 448]


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


def objects(stage: Stage, counts: list[int], rounds: int) -> Growth:
    found = measures.objects_in_a_click(stage, counts, rounds)
    each = {n: s.scaled(1 / n) for n, s in found.items()}
    curves = {"request": _milliseconds(found), "per object": _milliseconds(each)}
    return Growth(f"{stage.artifacts.name}: objects in a request", "objects", "ms", curves)


def batch(stage: Stage, sizes: list[int], rounds: int) -> Growth:
    found = measures.batches(stage, sizes, rounds)
    each = {n: s.scaled(1 / n) for n, s in found.items()}
    curves = {"request": _milliseconds(found), "per image": _milliseconds(each)}
    return Growth(f"{stage.artifacts.name}: images encoded together", "images", "ms", curves)


def photo_side(stage: Stage, sides: list[int], rounds: int) -> Growth:
    found = measures.photo_sides(stage, sides, rounds)
    curves = {
        kind: _milliseconds({side: samples[kind] for side, samples in found.items()})
        for kind in ("first mask", "click")
    }
    title = f"{stage.artifacts.name}: side of the caller's square photo"
    return Growth(title, "pixels", "ms", curves)


def model_side(
    build: Callable[[int], artifacts.Artifacts], sides: list[int], rounds: int, device: str
) -> Growth:
    """Encoder and decoder without a server, exported for other image sizes."""
    encode: dict[int, Sample] = {}
    decode: dict[int, Sample] = {}
    for side in sides:
        built = build(side)
        with Engine(built.repository, device) as engine:
            found = alternate({"encode": engine.encode, "decode": engine.decode}, rounds)
        encode[side], decode[side] = found["encode"], found["decode"]
    curves = {"encode": _milliseconds(encode), "decode": _milliseconds(decode)}
    return Growth("demo: side of the model's input", "pixels", "ms", curves)


def clients(
    stage: Stage,
    names: list[str],
    counts: list[int],
    seconds: float,
    progress: Callable[[str], None],
) -> list[Growth]:
    """Clicks per second, and the latency of a click, as more people click at once.

    A peer that fails under a crowd has an empty curve, and the reason is told. Raises RuntimeError
    where ours fails.
    """
    rates: dict[str, dict[int, Sample]] = {}
    latencies: dict[str, dict[int, Sample]] = {}
    for name in names:
        found: Mapping[int, Throughput] = {}
        try:
            found = measures.concurrent_clients(stage, name, counts, seconds)
        except RuntimeError as error:
            if name == OURS:
                raise
            progress(f"{name}, a crowd: not measured, {reason(error)}")
        rates[name] = {n: Sample((t.per_second,)) for n, t in found.items()}
        latencies[name] = _milliseconds({n: t.latency for n, t in found.items()})
    model = stage.artifacts.name
    return [
        Growth(f"{model}: clicks per second, all clickers together", "clickers", "1/s", rates),
        Growth(f"{model}: latency of a click", "clickers", "ms", latencies),
    ]
