"""Freed memory is used again rather than made anew: counted in page faults, in a process apart."""

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
PAGES = 10 * 72 * 2**20 // 4096


def faults(mode: str) -> int:
    folder = Path(memory.__file__).parent
    run = subprocess.run(
        [sys.executable, "-c", COUNT, mode], cwd=folder, capture_output=True, text=True, check=True
    )
    return int(run.stdout)


def test_freed_memory_stays_with_the_process() -> None:
    assert faults("kept") < PAGES / 5


def test_it_would_not_otherwise() -> None:
    assert faults("as it is") > PAGES / 3
