"""What is measured on a stage: one function per question, alternating between peers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from benchmarks import decoding
from benchmarks.peers import Peer, whole
from benchmarks.peers.in_process import InProcess
from benchmarks.stage import IN_PROCESS, OURS, PLACE, WHOLE, Stage
from benchmarks.timing import Sample, alternate, difference, ratio, seconds, stopwatch
from triton_sam3.geometry import resize

ONE_SHOT = "one-shot request"


def clicks(stage: Stage, rounds: int, *, pause: float = 0.0) -> dict[str, Sample]:
    """Seconds for a click on an opened photo, from call to mask, by peer."""
    meters = {name: stopwatch(partial(click, *PLACE)) for name, click in stage.clicks.items()}
    return alternate(meters, rounds, pause=pause)


def first_masks(stage: Stage, rounds: int) -> dict[str, Sample]:
    """Seconds from a new photo to its first mask, by peer."""

    def open_and_click(peer: Peer) -> object:
        return peer.open(stage.photo)(*PLACE)

    asks: dict[str, Callable[[], object]] = {
        name: partial(open_and_click, peer) for name, peer in stage.peers.items()
    }
    other = stage.peers.get(WHOLE)
    asks[OURS] = lambda: stage.ours.client.segment(stage.photo, points=[PLACE])
    if isinstance(other, whole.WholeInTriton):
        asks[WHOLE] = lambda: other.ask(*PLACE, stage.photo)
    meters = {name: stopwatch(ask) for name, ask in asks.items()}
    return alternate(meters, rounds)


def encoding(stage: Stage, rounds: int, budget: float) -> dict[str, Sample]:
    """Seconds from photo to embeddings, for ours over gRPC and back and for Meta's `set_image`; and
    seconds for our request that includes the photo, returns a mask and keeps nothing.

    budget: seconds after which no new round starts.
    """
    meta = stage.peers[IN_PROCESS]
    assert isinstance(meta, InProcess)
    meters = {
        OURS: stopwatch(lambda: stage.wire.encode(resize(stage.photo, stage.wire.side)[None])),
        IN_PROCESS: stopwatch(lambda: meta.predictor.set_image(stage.photo)),
        ONE_SHOT: stopwatch(partial(stage.ours.client.segment, stage.photo, points=[PLACE])),
    }
    return alternate(meters, rounds, warmup=0, budget=budget)


def boxes_together(stage: Stage, rounds: int, count: int = 32) -> Sample:
    """Ratio of one request with `count` boxes to as many requests with one box each."""
    boxes = _boxes(stage, count)
    with stage.ours.client.open(stage.photo) as view:
        samples = alternate(
            {
                "together": stopwatch(lambda: view.segment(boxes=boxes)),
                "apart": stopwatch(lambda: [view.segment(boxes=[box]) for box in boxes]),
            },
            rounds,
        )
    return ratio(samples["together"], samples["apart"])


def _boxes(stage: Stage, count: int) -> NDArray[np.float32]:
    height, width = stage.photo.shape[:2]
    corners = np.random.default_rng(0).random((count, 2, 2)) * (width, height)
    boxes: NDArray[np.float64] = np.concatenate((corners.min(1), corners.max(1)), axis=1)
    return boxes.astype(np.float32)


def server_cost(stage: Stage, blocks: int, clicks: int = 30) -> dict[str, Sample]:
    """Seconds for a click over the wire, the part of it that the decoder spent decoding, and the
    rest; means over each block of clicks.

    "trip" is a round trip without decoding, after a pause as long as decoding takes: by then
    everything that a request passes through is asleep.
    """
    kept = stage.keep_photo()
    click = partial(stage.wire.click, kept)
    for _ in range(clicks):
        click()
    pairs = [_block(stage.metrics_url, click, clicks) for _ in range(blocks)]
    whole, compute = (Sample(values) for values in zip(*pairs, strict=True))
    trips = {"trip": stopwatch(stage.wire.rejected_click)}
    trip = alternate(trips, clicks, warmup=3, pause=compute.median)
    parts = {"click": whole, "compute": compute, "server": difference(whole, compute)}
    return {**parts, **trip}


def _block(url: str, click: Callable[[], object], clicks: int) -> tuple[float, float]:
    """Mean seconds of a click, and of its decoding as the decoder counted it."""
    before = decoding.settled(url)
    took = [seconds(click) for _ in range(clicks)]
    after = decoding.settled(url, before.launches + clicks)
    return fmean(took), (after.seconds - before.seconds) / clicks
