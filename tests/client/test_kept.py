"""Which image the server keeps under which id."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from triton_sam3.kept import ImageMemory


def test_the_same_image_shares_a_slot() -> None:
    memory = ImageMemory(2, threading.Lock)
    assert memory.slot("a") is memory.slot("a")
    assert memory.slot("a") is not memory.slot("b")


def test_the_least_recently_used_image_is_forgotten() -> None:
    memory = ImageMemory(2, threading.Lock)
    a, b = memory.slot("a"), memory.slot("b")
    memory.slot("a")
    memory.slot("c")
    assert memory.slot("a") is a
    assert memory.slot("b") is not b


def test_with_a_limit_of_0_no_slot_is_shared() -> None:
    memory = ImageMemory(0, threading.Lock)
    assert memory.slot("a") is not memory.slot("a")


def test_only_the_lost_id_is_evicted() -> None:
    slot = ImageMemory(1, threading.Lock).slot("a")
    slot.image_id = b"new"
    slot.forget(b"old")
    assert slot.image_id == b"new"
    slot.forget(b"new")
    assert slot.image_id is None


def test_threads_agree_on_the_slot() -> None:
    def make_lock() -> threading.Lock:
        time.sleep(0.1)  # the other thread looks for the slot meanwhile
        return threading.Lock()

    memory = ImageMemory(4, make_lock)
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(memory.slot, ["a", "a"])
    assert first is second
