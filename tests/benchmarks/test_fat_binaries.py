"""Removed kernels become zeros; everything else stays unchanged and in place."""

from __future__ import annotations

import importlib.util
import struct
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import fat_binaries
from benchmarks.fat_binaries import MACHINE_CODE, find, prune

PTX = 1
HEADER = 64


def entry(kind: int, architecture: int, content: bytes) -> bytes:
    header = struct.pack("<HHIQ", kind, 257, HEADER, len(content))
    return (
        header.ljust(28, b"\0")
        + struct.pack("<I", architecture).ljust(HEADER - 28, b"\0")
        + content
    )


def container(*entries: bytes) -> bytes:
    content = b"".join(entries)
    return fat_binaries.MAGIC + struct.pack("<Q", len(content)) + content


LIBRARY = (
    b"\x7fELF code and data"
    + container(entry(MACHINE_CODE, 80, b"eighty"), entry(MACHINE_CODE, 90, b"attention"))
    + b"more of it, " * 3
    + fat_binaries.MAGIC  # by chance: the size that follows points beyond the end
    + b"\xff" * 8
    + container(entry(PTX, 90, b"text"), entry(MACHINE_CODE, 90, b"experts"))
    + b"the end"
)


def test_kernels_are_found_and_chance_matches_are_not() -> None:
    found = [(k.kind, k.architecture, LIBRARY[k.content]) for k in find(LIBRARY)]
    assert found == [
        (MACHINE_CODE, 80, b"eighty"),
        (MACHINE_CODE, 90, b"attention"),
        (PTX, 90, b"text"),
        (MACHINE_CODE, 90, b"experts"),
    ]


def test_unneeded_kernels_become_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "library.so"
    path.write_bytes(LIBRARY)
    monkeypatch.setattr(fat_binaries, "sources", lambda *_: ["flash_cu", "moe_cu"])
    prune(path, 90, lambda name: name.startswith("moe"))
    expected = LIBRARY
    for gone in (b"eighty", b"text", b"experts"):
        expected = expected.replace(gone, bytes(len(gone)))
    assert path.read_bytes() == expected


def test_a_library_that_cuobjdump_lists_differently_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "library.so"
    path.write_bytes(LIBRARY)
    monkeypatch.setattr(fat_binaries, "sources", lambda *_: ["flash_cu"])
    with pytest.raises(ValueError, match="kernels of 2 files, but cuobjdump lists 1"):
        prune(path, 90, lambda _: False)
    assert path.read_bytes() == LIBRARY


def test_a_real_librarys_kernels_are_those_that_cuobjdump_finds() -> None:
    """PyTorch's, whose linear algebra kernels come in a separate library."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).parent / "lib" / "libtorch_cuda_linalg.so"
    counts = Counter(k.architecture for k in find(path.read_bytes()) if k.kind == MACHINE_CODE)
    assert counts[90] > 10
    names = fat_binaries.sources(path, 90)
    assert len(names) == counts[90]
    assert all(name.endswith("_cu") for name in filter(None, names))
    assert any(names) == ("INTERNAL_" in fat_binaries.symbols(path, 90))  # not in torch 2.14's
