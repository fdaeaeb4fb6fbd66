"""What is measured on a stage: one function per question, alternating between peers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from benchmarks import decoding
from benchmarks.load import shifted
from benchmarks.peers import Peer, whole
from benchmarks.peers.in_process import InProcess
from benchmarks.stage import IN_PROCESS, OURS, PLACE, WHOLE, Stage
from benchmarks.timing import Sample, alternate, difference, ratio, seconds, stopwatch
from triton_sam3 import Client
from triton_sam3.geometry import resize

ONE_SHOT, CLICK = "one-shot request", "click"


def clicks(stage: Stage, rounds: int, *, pause: float = 0.0) -> dict[str, Sample]:
    """Seconds for a click on an opened photo, from call to mask, by peer."""
    meters = {name: stopwatch(partial(click, *PLACE)) for name, click in stage.clicks.items()}
    return alternate(meters, rounds, pause=pause)


def first_masks(stage: Stage, rounds: int) -> dict[str, Sample]:
    """Seconds from a new photo to its first mask, by peer. Each keeps the photo for later clicks.

    Ours and the one in Triton do both in one request; ours remembers one photo, so two that
    alternate are always new.
    """

    def open_and_click(peer: Peer) -> object:
        return peer.open(stage.photo)(*PLACE)

    asks: dict[str, Callable[[], object]] = {
        name: partial(open_and_click, peer) for name, peer in stage.peers.items()
    }
    other = stage.peers.get(WHOLE)
    if isinstance(other, whole.WholeInTriton):
        asks[WHOLE] = lambda: other.ask(*PLACE, stage.photo)
    photos = cycle((stage.photo, shifted(stage.photo, 1)))
    with Client(stage.ours.client.url, timeout=600, remember_images=1) as client:
        asks[OURS] = lambda: client.segment(next(photos), points=[PLACE])
        meters = {name: stopwatch(ask) for name, ask in asks.items()}
        return alternate(meters, rounds)


def encoding(stage: Stage, rounds: int, budget: float) -> dict[str, Sample]:
    """Seconds from photo to embeddings, for ours over gRPC and back and for Meta's `set_image`;
    for our request that includes the photo, returns a mask and keeps nothing; and for our click.

    budget: seconds after which no new round starts.
    """
    meta = stage.peers[IN_PROCESS]
    assert isinstance(meta, InProcess)
    meters = {
        OURS: stopwatch(lambda: stage.wire.encode(resize(stage.photo, stage.wire.side)[None])),
        IN_PROCESS: stopwatch(lambda: meta.predictor.set_image(stage.photo)),
        ONE_SHOT: stopwatch(partial(stage.ours.client.segment, stage.photo, points=[PLACE])),
        CLICK: stopwatch(partial(stage.clicks[OURS], *PLACE)),
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
