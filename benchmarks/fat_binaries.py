"""Remove GPU kernels from a library that has to be transferred; what is kept stays in place.

A library built for many GPUs holds its kernels once for each architecture, grouped by source file.
CUDA loads a file's kernels when one of them is first used, so the unused ones may as well be zeros,
which compress to almost nothing.

The format is the one that NVIDIA's tools write, as observed in such files:

    container   0xBA55ED50, u16 version, u16 header size, u64 size of what follows: entries
    entry       u16 kind, u16, u32 header size, u64 size, …, u32 architecture at 28; its content
"""

from __future__ import annotations

import importlib.util
import re
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

MAGIC = struct.pack("<IHH", 0xBA55ED50, 1, 16)
CONTAINER, ENTRY = struct.Struct("<8xQ"), struct.Struct("<HHIQ")
ARCHITECTURE = struct.Struct("<28xI")
MACHINE_CODE = 2
SOURCE = re.compile(r"INTERNAL_[0-9a-f]+_(\d+)_(\w+)")
"""Names of a source file's internal symbols contain the length of the file's name, and the name."""


@dataclass(frozen=True)
class Kernels:
    """One source file's kernels for one architecture, or its PTX."""

    kind: int
    architecture: int
    content: slice


def find(library: bytes | bytearray) -> Iterator[Kernels]:
    """Yield all of a library's kernels, in order."""
    position = library.find(MAGIC)
    while position >= 0:
        entry = position + CONTAINER.size
        end = entry + CONTAINER.unpack_from(library, position)[0]
        if end > len(library):  # the magic number occurs by chance
            end = position + len(MAGIC)
        while entry < end:
            kind, _, header, size = ENTRY.unpack_from(library, entry)
            (architecture,) = ARCHITECTURE.unpack_from(library, entry)
            start = entry + header
            yield Kernels(kind, architecture, slice(start, start + size))
            entry = start + size
        position = library.find(MAGIC, end)


def prune(path: Path, architecture: int, unneeded: Callable[[str], bool]) -> None:
    """Zero all kernels except those of one architecture whose source file is needed."""
    library = bytearray(path.read_bytes())
    every = list(find(library))
    own = [k for k in every if (k.kind, k.architecture) == (MACHINE_CODE, architecture)]
    names = sources(path, architecture)
    if len(names) != len(own):
        raise ValueError(
            f"{path.name}: kernels of {len(own)} files, but cuobjdump lists {len(names)}"
        )
    kept = {k.content.start for k, name in zip(own, names, strict=True) if not unneeded(name)}
    for kernels in every:
        if kernels.content.start not in kept:
            library[kernels.content] = bytes(kernels.content.stop - kernels.content.start)
    path.write_bytes(library)


def sources(path: Path, architecture: int) -> list[str]:
    """The name of each source file with kernels for an architecture, or "" if it is not listed."""
    listing = symbols(path, architecture)
    return [_source(names) for names in listing.split("Fatbin elf code:")[1:]]


def symbols(path: Path, architecture: int) -> str:
    """The listing of cuobjdump for an architecture's kernels."""
    command = [str(_cuobjdump()), "-arch", f"sm_{architecture}", "-symbols", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _source(names: str) -> str:
    found = SOURCE.search(names)
    return found[2][: int(found[1])] if found else ""


def _cuobjdump() -> Path:
    """The one in OpenAI's Triton, which comes with PyTorch."""
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
