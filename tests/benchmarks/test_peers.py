"""Every way to click gives Meta's mask; otherwise their times would mean nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks import load, measures
from benchmarks.artifacts import Artifacts
from benchmarks.peers import Peer, mask_iou
from benchmarks.stage import AGREEMENT, IN_PROCESS, OURS, PEERS, PLACE, Stage, stage
from tests.conftest import DEMO_CHECKPOINT


@pytest.fixture(scope="module")
def everything(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    built = Artifacts("demo", DEMO_CHECKPOINT, repository)
    with stage(built, PEERS, work_dir=tmp_path_factory.mktemp("whole")) as running:
        yield running


def test_masks_agree(everything: Stage) -> None:
    """On two things: where the model is in doubt, a rounded pixel decides what it shows."""
    for place in ((210.0, 210.0), (450.0, 150.0)):
        reference = everything.clicks[IN_PROCESS](*place)
        assert reference.shape == everything.photo.shape[:2]
        for name, click in everything.clicks.items():
            assert mask_iou(click(*place), reference) >= AGREEMENT, name


def test_every_peer_is_timed_the_same_number_of_rounds(everything: Stage) -> None:
    samples = measures.clicks(everything, rounds=2)
    assert samples.keys() == set(PEERS)
    assert all(len(sample.values) == 2 for sample in samples.values())
    assert all(value > 0 for sample in samples.values() for value in sample.values)


def test_a_first_mask_costs_more_than_a_click(everything: Stage) -> None:
    first = measures.first_masks(everything, rounds=3)
    clicks = measures.clicks(everything, rounds=3)
    assert first[OURS].median > clicks[OURS].median


def test_the_servers_share_of_a_click_is_what_the_decoder_leaves(everything: Stage) -> None:
    cost = measures.server_cost(everything, rounds=3)
    parts = zip(cost["click"].values, cost["compute"].values, strict=True)
    assert cost["server"].values == pytest.approx([click - compute for click, compute in parts])
    assert 0 < cost["trip"].median < cost["click"].median  # nothing is decoded for it


@pytest.mark.parametrize("name", [name for name in PEERS if name != IN_PROCESS])
def test_a_crowd_is_answered(name: str, everything: Stage) -> None:
    found = load.measure(everything.makers[name], everything.photo, clients=3, duration=2.0)
    assert found.clients == 3
    assert found.per_second == len(found.latency.values) / 2.0


def test_a_caller_that_fails_is_an_error(everything: Stage) -> None:
    with pytest.raises(RuntimeError, match="no server there"):
        load.measure(_no_server, everything.photo, clients=2, duration=0.1)


def _no_server() -> Peer:
    raise ConnectionError("no server there")


def test_callers_share_processes_and_none_is_forgotten() -> None:
    for clients in (1, 2, 16, 17, 64):
        shares = load._shares(clients)
        assert sum(shares) == clients
        assert min(shares) > 0


def test_another_photo_has_the_same_pixels_in_other_places(everything: Stage) -> None:
    other = load.another(everything.photo, 3)
    assert other.shape == everything.photo.shape
    assert not np.array_equal(other, everything.photo)
    assert other.sum() == everything.photo.sum()


def test_the_click_is_inside_the_photo(everything: Stage) -> None:
    height, width = everything.photo.shape[:2]
    assert 0 <= PLACE[0] < width
    assert 0 <= PLACE[1] < height
