"""Freed memory is reused rather than allocated anew, but not kept for good: in processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import memory

COUNT = """
import resource, sys
from memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "kept":
    keep_freed_memory()
    keep_freed_memory()  # again, as a second decoder of the process would
b"1" * (24 * 2**20)  # glibc adapts to what is freed, which is not enough
before = faults()
for _ in range(10):
    tensors = [b"1" * (12 * 2**20) for _ in range(6)]
    del tensors
print(faults() - before)
"""
FORGET = """
import sys
import store, torch
from memory import keep_freed_memory
from store import Features, ImageStore

def resident():
    with open("/proc/self/statm") as counts:
        return int(counts.read().split()[1]) * 4096 >> 20

now = 0.0
keep_freed_memory()
store.FREE_BYTES = int(sys.argv[1]) * 2**20
shelf = ImageStore(2**30, max_idle_seconds=10, clock=lambda: now)
sent = Features(*(torch.ones(8, 512, 512) for _ in range(3)))
for _ in range(6):
    shelf.keep(sent)
now = 8.0
shelf.keep(sent)  # stays, at the heap's end
shelf.sweep()
before = resident()
now = 12.0
shelf.get(shelf.keep(sent))  # forgets the others before a sweep does
shelf.sweep()
print(before - resident())
"""
FORGOTTEN = 6 * 3 * 8
"""MiB"""

PAGES = 10 * 72 * 2**20 // 4096


def number_printed_by(script: str, argument: str) -> int:
    folder, command = Path(memory.__file__).parent, [sys.executable, "-c", script, argument]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return int(run.stdout)


def faults(mode: str) -> int:
    return number_printed_by(COUNT, mode)


def test_freed_memory_stays_with_the_process() -> None:
    assert faults("kept") < PAGES / 5


def test_freed_memory_is_returned_by_default() -> None:
    assert faults("as it is") > PAGES / 3


def test_much_memory_of_evicted_images_is_given_back() -> None:
    """Except the space of the one image kept meanwhile."""
    assert number_printed_by(FORGET, "64") > FORGOTTEN - 32


def test_little_memory_of_evicted_images_is_kept_for_new_ones() -> None:
    assert abs(number_printed_by(FORGET, "512")) < 32
