"""Launches side by side: in order, bounded, each on its share of the cores."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator

import pytest
import torch
from workers import MIN_IMAGE_TOKENS, Workers


@pytest.fixture
def four_cores() -> Iterator[Workers]:
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    yield Workers()
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("objects", "size"), [(1, 1), (2, 2), (3, 3), (4, 2), (6, 2), (8, 2), (9, 3), (256, 64)]
)
def test_objects_are_shared_among_the_cores_at_least_two_each(
    four_cores: Workers, objects: int, size: int
) -> None:
    assert four_cores.launch_size(objects) == size


@pytest.mark.parametrize(
    ("items", "image_tokens", "threads"),
    [
        (1, MIN_IMAGE_TOKENS, [4]),
        (1, MIN_IMAGE_TOKENS - 1, [1]),
        (2, MIN_IMAGE_TOKENS, [2, 2]),
        (3, MIN_IMAGE_TOKENS, [1] * 3),
    ],
)
def test_each_launch_gets_its_share_of_the_cores_and_a_small_one_gets_one(
    four_cores: Workers, items: int, image_tokens: int, threads: list[int]
) -> None:
    for _ in range(2):  # whatever the launch before was given
        found = four_cores.map(lambda _: torch.get_num_threads(), range(items), image_tokens)
        assert list(found) == threads


def test_results_keep_their_order_and_launches_do_not_exceed_the_cores(
    four_cores: Workers,
) -> None:
    all_started = threading.Barrier(4, timeout=20)
    at_work, most, lock = 0, 0, threading.Lock()

    def work(item: int) -> int:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        all_started.wait()
        with lock:
            at_work -= 1
        return item

    assert list(four_cores.map(work, range(12), MIN_IMAGE_TOKENS)) == list(range(12))
    assert most == 4


def test_gradients_are_off_and_an_error_is_raised(four_cores: Workers) -> None:
    modes = four_cores.map(lambda _: torch.is_inference_mode_enabled(), range(2), MIN_IMAGE_TOKENS)
    assert list(modes) == [True] * 2

    def fails(item: int) -> int:
        raise MemoryError(item)

    with pytest.raises(MemoryError):
        list(four_cores.map(fails, range(3), MIN_IMAGE_TOKENS))


class Memory:
    """Stands in for a launch's tensors."""


def test_an_error_is_raised_once_nothing_else_runs_and_holds_no_memory(four_cores: Workers) -> None:
    """The requests of a failed batch are tried again one by one, in the memory that it had."""
    finished: list[int] = []
    held: list[weakref.ref[Memory]] = []

    def work(item: int) -> int:
        memory = Memory()
        held.append(weakref.ref(memory))
        if item == 0:
            raise MemoryError(item)
        time.sleep(0.2)
        finished.append(item)
        return item

    gc.disable()
    try:
        with pytest.raises(MemoryError):
            list(four_cores.map(work, range(3), MIN_IMAGE_TOKENS))
        assert sorted(finished) == [1, 2]
        assert [ref() for ref in held] == [None] * 3
    finally:
        gc.enable()
