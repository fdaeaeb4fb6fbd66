"""Memory regions that two processes on one host share, and who owns them.

A region's name identifies its owner: pid namespace, process id, and the start time of that process.
This distinguishes what a crashed client left behind from what a running one uses.
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
_NAME = re.compile(rf"{_PREFIX}_(?P<namespace>\d+)_(?P<pid>\d+)_(?P<start>\d+)_[0-9a-f]+")


class Region(Protocol):
    """A named piece of memory; `register` and `unregister` return the queries to send."""

    name: str
    size: int

    def write(self, arrays: Mapping[int, Array]) -> None:
        """Write arrays, given by the offset at which each begins."""

    def register(self) -> Query: ...

    def unregister(self) -> Query: ...

    def registered(self) -> None:
        """To be called once the server has mapped the region."""

    def close(self) -> None: ...


class SystemRegion:
    """Host memory: a file in /dev/shm, unlinked as soon as the server has mapped it."""

    def __init__(self, size: int) -> None:
        self.name, self.size = new_name(), size
        self._path = SYSTEM_FOLDER / self.name
        # Readable only by this user: images pass through it.
        file = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            # Reserved, not just sized: writing to a full /dev/shm would kill the process.
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
    """GPU memory; the driver frees it when the process that created it exits."""

    def __init__(self, size: int, device: int = 0) -> None:
        self._cuda = _cuda()
        self.name, self.size, self._device = new_name(), size, device
        try:
            self._handle = self._cuda.create_shared_memory_region(self.name, size, device)
        except self._cuda.CudaSharedMemoryException as error:
            raise OSError(f"the GPU cannot allocate {size} bytes: {error}") from error

    def write(self, arrays: Mapping[int, Array]) -> None:
        # The library writes from the beginning of the region, so all arrays are written as one.
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
    """Create a region of at least `size` bytes; raises OSError if there is no memory for it."""
    return SystemRegion(size) if kind == "system" else CudaRegion(size)


def check_available(kind: str) -> None:
    """Raise an error if this machine cannot share memory of this kind, saying what to do."""
    if kind not in get_args(Kind):
        raise ValueError(f"shared_memory must be 'system', 'cuda' or None, got {kind!r}")
    if kind == "system" and not (SYSTEM_FOLDER.is_dir() and Path("/proc/self/stat").exists()):
        raise TransportError("shared_memory='system' needs Linux with /dev/shm; omit it here")
    if kind == "cuda":
        try:
            probe = CudaRegion(1)
        except Exception as error:
            raise TransportError(
                f"shared_memory='cuda' needs an NVIDIA GPU and tritonclient[cuda] here ({error}); "
                "use shared_memory='system', or omit it"
            ) from error
        probe.close()


def _cuda() -> Any:
    import tritonclient.utils.cuda_shared_memory as cuda  # noqa: PLC0415 - needs a GPU's libraries

    return cuda


_abandoned: set[str] = set()
"""Names of this process's regions that a server may have mapped but no client uses."""


def abandon(region: Region) -> None:
    """Free a region that the server may have mapped; the next client has it unregistered."""
    _abandoned.add(region.name)
    region.close()


def is_abandoned(name: str) -> bool:
    """Whether the region is no longer used by any client."""
    return name in _abandoned or owner_is_dead(name)


def sweep_files() -> None:
    """Remove the files that dead clients of this host left between creation and registration."""
    for path in SYSTEM_FOLDER.glob(f"{_PREFIX}_*"):
        if owner_is_dead(path.name):
            with suppress(OSError):  # another user's
                path.unlink()


def new_name() -> str:
    namespace, pid = _pid_namespace(), os.getpid()
    return f"{_PREFIX}_{namespace}_{pid}_{_start_time(pid)}_{secrets.token_hex(8)}"


def owner_is_dead(name: str) -> bool:
    """Whether the region was created by a process of this pid namespace that has exited."""
    match = _NAME.fullmatch(name)
    if match is None or int(match["namespace"]) != _pid_namespace():
        return False
    return _start_time(int(match["pid"])) != int(match["start"])


def _pid_namespace() -> int:
    """The pid namespace: a process id means nothing in another one."""
    return Path("/proc/self/ns/pid").stat().st_ino


def _start_time(pid: int) -> int | None:
    """When process `pid` started, in clock ticks since boot; None if it is not running.

    Distinguishes a process from a later one with the same id.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # After the name, which may contain anything: first the state, 19 fields later the start time.
    state, *fields = stat.rpartition(")")[2].split()
    return None if state == "Z" else int(fields[18])
