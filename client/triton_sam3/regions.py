"""Pieces of memory that two processes of one host can both see, and whose they are.

The name says who made a region: pid namespace, process id, and when that process started. What a
crashed client leaves behind can so be told from what a living one uses.
"""

import mmap
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np

from .errors import TransportError
from .flow import Array, Query

Kind = Literal["system", "cuda"]

SYSTEM_FOLDER = Path("/dev/shm")
_PREFIX = "sam3_client"
_NAME = re.compile(rf"{_PREFIX}_(?P<space>\d+)_(?P<pid>\d+)_(?P<birth>\d+)_[0-9a-f]+")


class Region(Protocol):
    """A piece of memory under a name; `register` and `unregister` are what the server is told."""

    name: str
    size: int

    def write(self, arrays: Mapping[int, Array]) -> None:
        """Arrays by the offset at which each begins."""

    def register(self) -> Query: ...

    def unregister(self) -> Query: ...

    def registered(self) -> None:
        """The server has it mapped."""

    def close(self) -> None: ...


class SystemRegion:
    """Host memory: a file in /dev/shm, gone from there as soon as the server has mapped it."""

    def __init__(self, size: int) -> None:
        self.name, self.size = new_name(), size
        self._path = SYSTEM_FOLDER / self.name
        # Readable by this user alone: images pass through it.
        file = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            # Reserved, not just sized: writing to a full /dev/shm would end the process.
            os.posix_fallocate(file, 0, size)
            self._memory = mmap.mmap(file, size)
        except BaseException:
            self._path.unlink()
            raise
        finally:
            os.close(file)

    def write(self, arrays: Mapping[int, Array]) -> None:
        for offset, array in arrays.items():
            target: Array = np.ndarray(array.shape, array.dtype, self._memory, offset)
            np.copyto(target, array)

    def register(self) -> Query:
        return Query("register_system_shared_memory", (self.name, f"/{self.name}", self.size))

    def unregister(self) -> Query:
        return Query("unregister_system_shared_memory", (self.name,))

    def registered(self) -> None:
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        self._path.unlink(missing_ok=True)
        self._memory.close()


class CudaRegion:
    """GPU memory; the driver frees it with the process that made it."""

    def __init__(self, size: int, device: int = 0) -> None:
        self._cuda = _cuda()
        self.name, self.size, self._device = new_name(), size, device
        try:
            self._handle = self._cuda.create_shared_memory_region(self.name, size, device)
        except self._cuda.CudaSharedMemoryException as error:
            raise OSError(f"the GPU has no {size} bytes for it: {error}") from error

    def write(self, arrays: Mapping[int, Array]) -> None:
        # The library writes from the beginning on, so that all go as one.
        packed = np.zeros(max(at + array.nbytes for at, array in arrays.items()), np.uint8)
        for at, array in arrays.items():
            packed[at : at + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._cuda.set_shared_memory_region(self._handle, [packed])

    def register(self) -> Query:
        raw = self._cuda.get_raw_handle(self._handle)
        return Query("register_cuda_shared_memory", (self.name, raw, self._device, self.size))

    def unregister(self) -> Query:
        return Query("unregister_cuda_shared_memory", (self.name,))

    def registered(self) -> None:
        """Nothing to do: CUDA memory has no name in a file system."""

    def close(self) -> None:
        self._cuda.destroy_shared_memory_region(self._handle)


def make_region(kind: Kind, size: int) -> Region:
    """A new region of at least `size` bytes; OSError when there is no memory for it."""
    return SystemRegion(size) if kind == "system" else CudaRegion(size)


def check_available(kind: str) -> None:
    """Raise where this machine cannot share memory of this kind, saying why and what to do."""
    if kind not in get_args(Kind):
        raise ValueError(f"shared_memory must be 'system', 'cuda' or None, got {kind!r}")
    if kind == "system" and not (SYSTEM_FOLDER.is_dir() and Path("/proc/self/stat").exists()):
        raise TransportError("shared_memory='system' needs Linux with /dev/shm; leave it out here")
    if kind == "cuda":
        try:
            probe = CudaRegion(1)
        except Exception as error:
            raise TransportError(
                f"shared_memory='cuda' needs an NVIDIA GPU and tritonclient[cuda] here ({error}); "
                "use shared_memory='system', or leave it out"
            ) from error
        probe.close()


def _cuda() -> Any:
    import tritonclient.utils.cuda_shared_memory as cuda  # noqa: PLC0415 - needs a GPU's libraries

    return cuda


_given_up: set[str] = set()
"""Names of this process's regions that a server may have mapped, and that no client uses."""


def give_up(region: Region) -> None:
    """Free a region that the server may have mapped: the next client has it taken back."""
    _given_up.add(region.name)
    region.close()


def is_abandoned(name: str) -> bool:
    """Whether nobody uses the region any more."""
    return name in _given_up or owner_is_dead(name)


def sweep_files() -> None:
    """Remove the files that dead clients of this host left between creation and registration."""
    for path in SYSTEM_FOLDER.glob(f"{_PREFIX}_*"):
        if owner_is_dead(path.name):
            with suppress(OSError):  # another user's
                path.unlink()


def new_name() -> str:
    space, pid = _pid_space(), os.getpid()
    return f"{_PREFIX}_{space}_{pid}_{_birth(pid)}_{secrets.token_hex(8)}"


def owner_is_dead(name: str) -> bool:
    """Whether the region was made by a process of this pid namespace that has ended."""
    match = _NAME.fullmatch(name)
    if match is None or int(match["space"]) != _pid_space():
        return False
    return _birth(int(match["pid"])) != int(match["birth"])


def _pid_space() -> int:
    """The pid namespace: a process id means nothing in another one."""
    return Path("/proc/self/ns/pid").stat().st_ino


def _birth(pid: int) -> int | None:
    """When process `pid` started, in clock ticks since boot; None if it does not run.

    Tells a process from a later one that was given the same id.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # After the name, which may hold anything: the state first, the start time 19 fields on.
    state, *fields = stat.rpartition(")")[2].split()
    return None if state == "Z" else int(fields[18])
