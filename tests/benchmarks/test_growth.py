"""Curves, and that one peer's failure does not affect the others."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from benchmarks import growth, load
from benchmarks.load import Throughput
from benchmarks.peers import Peer, Photo
from benchmarks.stage import HTTP, OURS, Stage
from benchmarks.timing import Sample

STAGE = cast(
    Stage,
    SimpleNamespace(
        artifacts=SimpleNamespace(name="demo"), makers={OURS: "ours", HTTP: "http"}, photo=None
    ),
)


def crowds_without(failing: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The table of clicks per second when one peer fails, and what was reported."""

    def measure(make: Callable[[], Peer], photo: Photo, clients: int, _: float) -> Throughput:
        if make == STAGE.makers[failing]:
            raise RuntimeError("a caller failed: connection reset")
        return Throughput(10.0 * clients, Sample((0.1,)))

    monkeypatch.setattr(load, "measure", measure)
    messages: list[str] = []
    growths = growth.clients(STAGE, [OURS, HTTP], [1, 16], 2, 1.0, messages.append)
    return [growths[0].markdown(), *messages]


def test_a_peer_that_fails_under_load_does_not_cost_our_curve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table, reason = crowds_without(HTTP, monkeypatch)
    assert "| ours | 10 1/s | 160 1/s |" in table
    assert f"| {HTTP} | — | — |" in table
    assert (
        reason == f"{HTTP}, concurrent clickers: not measured, RuntimeError: a caller failed: "
        "connection reset"
    )


def test_without_ours_there_is_no_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="connection reset"):
        crowds_without(OURS, monkeypatch)


def test_each_amount_of_work_is_timed_with_that_much_of_it() -> None:
    """On a server that takes 10 ms for each object and for each image."""

    class Wire:
        side = 8

        def click(self, kept: str, objects: int) -> None:
            assert kept == "the photo's id"
            time.sleep(0.01 * objects)

        def encode(self, images: Photo) -> None:
            time.sleep(0.01 * len(images))

    photo = np.zeros((4, 6, 3), np.uint8)
    served = {"wire": Wire(), "photo": photo, "keep_photo": lambda: "the photo's id"}
    stage = cast(Stage, SimpleNamespace(**{**vars(STAGE), **served}))
    for measure in (growth.objects, growth.batch):
        milliseconds = measure(stage, [1, 8], 3).curves["together"]
        assert min(milliseconds[1].values) >= 10
        assert min(milliseconds[8].values) >= 80 > milliseconds[1].median


def test_batched_work_is_also_shown_per_item() -> None:
    seconds = {1: Sample((0.010,)), 4: Sample((0.020,))}
    table = growth.together("clicks", "images", seconds).markdown()
    assert "| images → | 1 | 4 |" in table
    assert "| together | 10 ms | 20 ms |" in table
    assert "| each | 10 ms | 5 ms |" in table
