"""The processes of a server, and the memory used by them and their shared regions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "shm-region-prefix-name="


@dataclass(frozen=True)
class Census:
    """A server at one moment."""

    processes: frozenset[tuple[int, float]]
    """Process ids with their start times, so that a restarted process differs."""
    resident: int
    """Bytes resident in all processes; shared memory counts once for each of them."""
    parts: Mapping[str, int]
    """Bytes of unshared memory, by the model that the process runs."""
    shared: int
    """Bytes of the shared memory regions."""

    @property
    def private(self) -> int:
        return sum(self.parts.values())

    @classmethod
    def from_pid(cls, pid: int) -> Census:
        """Measure tritonserver and its descendants. Raises psutil.NoSuchProcess."""
        server = psutil.Process(pid)
        family = [server, *server.children(recursive=True)]
        memory = [process.memory_full_info() for process in family]
        parts: Counter[str] = Counter()
        for process, each in zip(family, memory, strict=True):
            parts[part(process)] += each.uss
        return cls(
            frozenset((process.pid, process.create_time()) for process in family),
            sum(each.rss for each in memory),
            parts,
            _regions(server),
        )


def part(process: psutil.Process) -> str:
    """The model that a Python stub serves; for any other process, the program's name.

    A stub is started with the path of MODEL/1/model.py, or of the file that a Python-based backend
    runs instead, such as MODEL/1/model.onnx. Raises psutil.NoSuchProcess.
    """
    for path in map(Path, process.cmdline()):
        if path.stem == "model" and path.parent.name.isdecimal():
            return path.parts[-3]
    return process.name()


def _regions(server: psutil.Process) -> int:
    for word in server.cmdline():
        if PREFIX in word:
            found = SHARED_MEMORY.glob(word.partition(PREFIX)[2] + "*")
            return sum(path.stat().st_blocks * 512 for path in found)
    return 0


def is_alive(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
