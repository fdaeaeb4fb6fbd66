"""Every peer gives Meta's mask; otherwise their times would be meaningless."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

from benchmarks import growth, load, measures
from benchmarks.artifacts import Artifacts
from benchmarks.peers import Click, Mask, Photo
from benchmarks.stage import AGREEMENT, IN_PROCESS, OURS, PEERS, WHOLE, Stage, load_photo, stage
from demo.prompts import iou
from tests.conftest import DEMO_CHECKPOINT, ROOT


@pytest.fixture(scope="module")
def everything(repository: Path) -> Iterator[Stage]:
    built = Artifacts("demo", DEMO_CHECKPOINT, repository)
    with stage(built) as running:
        yield running


def test_masks_agree(everything: Stage) -> None:
    """On two clear objects: where the model is uncertain, a rounded pixel can change the mask."""
    for place in ((210.0, 210.0), (450.0, 150.0)):
        reference = everything.clicks[IN_PROCESS](*place)
        assert reference.shape == everything.photo.shape[:2]
        for name, click in everything.clicks.items():
            assert iou(click(*place), reference) >= AGREEMENT, name


def test_every_peer_is_timed_the_same_number_of_rounds(everything: Stage) -> None:
    samples = measures.clicks(everything, rounds=2)
    assert samples.keys() == set(PEERS)
    assert all(len(sample.values) == 2 for sample in samples.values())
    # A decoder takes milliseconds on any machine; nothing, less than a microsecond.
    assert all(value > 1e-4 for sample in samples.values() for value in sample.values)


def test_every_peers_first_mask_is_timed_with_encoding_the_photo(everything: Stage) -> None:
    """So it takes longer than a click; the fastest of several, because the machine may be busy."""
    samples, clicks = (
        measure(everything, 5) for measure in (measures.first_masks, measures.clicks)
    )
    assert samples.keys() == set(PEERS)
    assert all(len(sample.values) == 5 for sample in samples.values())
    for name, sample in samples.items():
        assert min(sample.values) > 1.5 * min(clicks[name].values), name


def test_encoding_is_timed_beside_requests_with_and_without_it(everything: Stage) -> None:
    fastest = {
        name: min(sample.values)
        for name, sample in measures.encoding(everything, rounds=5, budget=60.0).items()
    }
    assert fastest.keys() == {OURS, IN_PROCESS, measures.ONE_SHOT, measures.CLICK}
    assert fastest[OURS] > 1e-3
    assert fastest[measures.ONE_SHOT] > 1.5 * fastest[measures.CLICK]


def test_boxes_together_take_less_time_than_apart(everything: Stage) -> None:
    assert measures.boxes_together(everything, rounds=1, count=16).median < 1


def test_a_larger_photo_takes_longer(everything: Stage) -> None:
    curves = growth.photo_side(everything, [224, 4096], rounds=3).curves
    for name in ("first mask", "click"):
        assert min(curves[name][4096].values) > min(curves[name][224].values)


def test_the_servers_share_of_a_click_is_what_the_decoder_leaves(everything: Stage) -> None:
    """By the decoder's metrics for exactly the same clicks, so that it is never negative."""
    cost = measures.server_cost(everything, blocks=2, clicks=4)
    for click, compute, server in zip(
        *(cost[name].values for name in ("click", "compute", "server")), strict=True
    ):
        assert 0 < compute < click
        assert server == pytest.approx(click - compute)


@pytest.mark.parametrize("name", [name for name in PEERS if name not in (IN_PROCESS, WHOLE)])
def test_concurrent_clicks_are_answered(name: str, everything: Stage) -> None:
    found = load.measure(everything.makers[name], everything.photo, clients=3, duration=1.0)
    latencies = found.latency.values
    assert found.per_second == len(latencies) - 3 > 0  # each caller's last click comes too late
    assert sum(latencies) > 3 * 1.0 > sum(sorted(latencies)[:-3])


def test_the_http_service_ends_with_its_caller_however_that_ends() -> None:
    code = f"""
import time
from pathlib import Path
from benchmarks.peers.http_service import running
with running(Path({str(DEMO_CHECKPOINT)!r})) as (host, port):
    print(port, flush=True)
    time.sleep(600)
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        assert caller.stdout.readline().strip().isdigit()
        (service,) = psutil.Process(caller.pid).children()
        caller.kill()
    service.wait(20)


@dataclass
class _Slow:
    """Takes longer for a click than the measurement does."""

    def open(self, _: Photo) -> Click:
        return self.click

    def click(self, *_: float) -> Mask:
        time.sleep(0.2)
        return np.ones((1, 1), np.bool_)

    def close(self) -> None:
        pass


def test_clicks_that_outlast_the_measurement_count_for_the_latency() -> None:
    found = load.measure(_Slow, load_photo(), clients=2, duration=0.1)
    assert found.per_second == 0
    assert len(found.latency.values) == 2
    assert min(found.latency.values) >= 0.2


class _ToldLast(ConnectionError):
    """Waits for its message in a file, which another caller writes, and a moment longer."""

    def __str__(self) -> str:
        path: Path = self.args[0]
        while not path.exists():
            time.sleep(0.01)
        time.sleep(0.5)
        return path.read_text()


@dataclass
class _RefusesOne:
    """Answers about every photo except the first caller's."""

    path: Path

    def open(self, photo: Photo) -> Click:
        if np.array_equal(photo, load_photo()):
            raise _ToldLast(self.path)
        return self.click

    def click(self, *_: float) -> Mask:
        self.path.write_text("no server there")
        return np.ones((1, 1), np.bool_)

    def close(self) -> None:
        pass


def test_the_original_failure_is_reported_instead_of_its_consequences(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(load, "_shares", lambda clients: [1] * clients)
    refusing = partial(_RefusesOne, tmp_path / "words")
    with pytest.raises(RuntimeError, match=r"failed: _ToldLast: no server there$"):
        load.measure(refusing, load_photo(), clients=2, duration=0.1)


def test_callers_share_processes_and_none_is_left_out() -> None:
    for clients in (1, 2, 16, 17, 64):
        shares = load._shares(clients)
        assert sum(shares) == clients
        assert min(shares) > 0


def test_another_photo_has_the_same_pixels_in_other_places(everything: Stage) -> None:
    other = load.shifted(everything.photo, 3)
    assert other.shape == everything.photo.shape
    assert not np.array_equal(other, everything.photo)
    assert other.sum() == everything.photo.sum()
