"""A small private disk for a server, in its own mount namespace. Needs root."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.environment import ROOT

_OWN = ("unshare", "--mount")
_MOUNT = 'mount -t tmpfs -o "size=$1" tmpfs "$0" && echo mounted && exec sleep infinity'
_INSIDE = ("sh", "-c", 'cd "$0" && exec "$@"', str(ROOT))


def refused() -> bool:
    """Whether this user may not create one."""
    return bool(subprocess.run([*_OWN, "true"], capture_output=True, check=False).returncode)


@contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[tuple[str, ...]]:
    """Mount a tmpfs at `folder` that outlives a server; yields a prefix to run commands inside."""
    holding = subprocess.Popen(
        [*_OWN, "sh", "-c", _MOUNT, str(folder), f"{mib}m"], stdout=subprocess.PIPE
    )
    try:
        assert holding.stdout is not None
        if not holding.stdout.readline():
            raise RuntimeError(f"no tmpfs could be mounted at {folder}")
        yield ("nsenter", f"--mount=/proc/{holding.pid}/ns/mnt", *_INSIDE)
    finally:
        holding.kill()
        holding.communicate()
