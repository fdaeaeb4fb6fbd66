"""Pieces of shared memory, and telling whose they are."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from unittest.mock import create_autospec

import numpy as np
import pytest
from tritonclient.utils import cuda_shared_memory

from triton_sam3 import regions
from triton_sam3.errors import TransportError
from triton_sam3.flow import Query
from triton_sam3.regions import (
    SYSTEM_FOLDER,
    CudaRegion,
    SystemRegion,
    check_available,
    new_name,
    owner_is_dead,
    sweep_files,
)

STEPS = np.arange(16, dtype=np.uint8).reshape(2, 8)[:, ::2]
"""Not contiguous."""


def test_a_region_is_private_and_gone_from_the_folder_once_registered() -> None:
    region = SystemRegion(4096)
    path = SYSTEM_FOLDER / region.name
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_size == 4096
    region.write({64: STEPS, 0: np.ones(1, np.float16)})
    assert path.read_bytes()[64:72] == bytes([0, 2, 4, 6, 8, 10, 12, 14])
    assert path.read_bytes()[:4] == b"\x00\x3c\x00\x00"
    assert region.register() == Query(
        "register_system_shared_memory", (region.name, f"/{region.name}", 4096)
    )
    region.registered()
    assert not path.exists()
    region.write({0: np.ones(4096, np.uint8)})  # the mapping outlives the file
    region.close()


def test_gpu_memory_is_written_as_the_library_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held to the real library's signatures; a GPU's own test is in test_shared_memory."""
    library = create_autospec(cuda_shared_memory)
    monkeypatch.setattr(regions, "_cuda", lambda: library)
    region = CudaRegion(4096)
    region.write({0: np.ones((1, 1), np.float16), 64: STEPS, 128: np.ones((1, 1), np.bool_)})
    handle, (packed,) = library.set_shared_memory_region.call_args.args
    assert handle is library.create_shared_memory_region.return_value
    assert packed.tobytes()[:3] == b"\x00\x3c\x00"
    assert packed.tobytes()[64:72] == bytes([0, 2, 4, 6, 8, 10, 12, 14])
    assert packed.tobytes()[128:] == b"\x01"


def test_a_region_that_was_never_registered_leaves_no_file() -> None:
    region = SystemRegion(4096)
    region.close()
    assert not (SYSTEM_FOLDER / region.name).exists()


def test_names_cannot_be_guessed() -> None:
    names = {new_name() for _ in range(100)}
    assert len(names) == 100
    assert all(len(name.rpartition("_")[2]) == 16 for name in names)


def test_this_process_counts_as_alive() -> None:
    assert not owner_is_dead(new_name())
    assert not owner_is_dead("somebody_elses_region")


def test_another_process_with_the_same_id_is_not_the_owner() -> None:
    prefix, _, rest = new_name().rpartition(f"_{os.getpid()}_")
    _, _, token = rest.partition("_")
    assert owner_is_dead(f"{prefix}_{os.getpid()}_1_{token}")


def test_regions_of_another_pid_namespace_are_left_alone() -> None:
    head, space, tail = new_name().partition(str(Path("/proc/self/ns/pid").stat().st_ino))
    assert space
    assert not owner_is_dead(f"{head}1{tail}".replace(str(os.getpid()), "999999999"))


def dying(code: str) -> str:
    """Run `code`, which prints a line and kills itself; the line."""
    script = f"import os, signal\n{code}\nos.kill(os.getpid(), signal.SIGKILL)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    return done.stdout.strip()


def test_only_the_files_of_dead_processes_are_swept() -> None:
    name = dying(
        "from triton_sam3.regions import SystemRegion\nprint(SystemRegion(4096).name, flush=True)"
    )
    mine = SystemRegion(4096)
    assert (SYSTEM_FOLDER / name).exists()
    assert owner_is_dead(name)
    sweep_files()
    assert not (SYSTEM_FOLDER / name).exists()
    assert (SYSTEM_FOLDER / mine.name).exists()
    mine.close()


def test_a_zombie_counts_as_dead() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "from triton_sam3.regions import new_name; print(new_name())"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    name = child.stdout.read().strip()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, and not yet reaped
    assert owner_is_dead(name)
    child.stdout.close()
    child.wait()


def test_an_unknown_kind_is_rejected() -> None:
    with pytest.raises(ValueError, match="must be 'system', 'cuda' or None, got 'posix'"):
        check_available("posix")
    check_available("system")


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="about a machine without a GPU")
def test_cuda_without_a_gpu_is_an_error_before_anything_is_sent() -> None:
    with pytest.raises(TransportError, match="needs an NVIDIA GPU"):
        check_available("cuda")


def test_a_regions_memory_is_reserved() -> None:
    """Sized alone, writing to a full /dev/shm would end the process (SIGBUS)."""
    region = SystemRegion(1 << 20)
    assert (SYSTEM_FOLDER / region.name).stat().st_blocks * 512 >= 1 << 20
    region.close()
