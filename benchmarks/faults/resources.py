"""Faults of the machine's resources: shared memory and the clock."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.faults import mounts
from benchmarks.faults.bench import Bench
from benchmarks.faults.load import Caller, Question, observe
from benchmarks.faults.stand import Stand
from benchmarks.faults.trial import Result, Trial
from benchmarks.fuzz.census import SHARED_MEMORY
from triton_sam3 import Client
from triton_sam3.contract import DECODER

SHM_MIB = 128
FULL_SECONDS = 6.0
BOX = (4, 4, 60, 60)
MUCH = (64, 160, 256)
YEARS = timedelta(days=3650)
FAKETIME_REGIONS = "*faketime_s*"
"""Files in /dev/shm: libfaketime's shared state and its semaphore."""


def shm_full(bench: Bench, title: str) -> Result:
    """Fill /dev/shm while requests arrive that need more shared memory than any before."""
    if mounts.refused():
        return Result(title, skipped="needs root, to give the server its own /dev/shm")
    with (
        mounts.small_disk(SHARED_MEMORY, SHM_MIB) as inside,
        Stand(bench.repository, bench.folder(), wrapper=inside) as stand,
    ):
        callers = [Caller(stand.http, {"remember_images": 0}), Caller(stand.grpc)]
        questions = bench.questions(stand)
        with Client(stand.grpc) as client:
            right = _much(client, questions[0], 1)
        filler = Path(f"/proc/{stand.container.process.pid}/root/dev/shm/filler")

        def fill_and_ask() -> None:
            _fill(filler)
            try:
                _ask_for_much(stand, trial, right)
            finally:
                filler.unlink(missing_ok=True)

        with Trial(title, stand, questions, callers=callers) as trial:
            trial.inject(fill_and_ask)
            trial.recover()
        return trial.result()


def _fill(filler: Path) -> None:
    """Fill up the server's own /dev/shm, writing at most its size."""
    with filler.open("wb", buffering=0) as file:
        try:
            for _ in range(SHM_MIB * 256):
                file.write(bytes(4096))
        except OSError:
            return
    raise RuntimeError("/dev/shm was not full after writing its size")


def _ask_for_much(stand: Stand, trial: Trial, right: npt.NDArray[np.bool_]) -> None:
    """What is rejected must be rejected with a clear message, and the rest answered correctly."""
    until = time.monotonic() + FULL_SECONDS
    with Client(stand.grpc, timeout=8.0, remember_images=0) as client:

        def ask(times: int) -> None:
            while time.monotonic() < until:
                much = partial(_much, client, trial.questions[0], times)
                trial.others.append(observe(much, right, 8.0))

        with ThreadPoolExecutor(len(MUCH)) as threads:
            list(threads.map(ask, MUCH))


def _much(client: Client, question: Question, times: int) -> npt.NDArray[np.bool_]:
    """One mask of that many identical ones."""
    masks: npt.NDArray[np.bool_] = client.segment(question.image, boxes=[BOX] * times).masks[:1]
    return masks


def clock_jump(bench: Bench, title: str) -> Result:
    """Make the wall clock of all the server's processes jump; kept images must survive and expire.

    The store ages by `time.monotonic`, which does not jump; this shows that nothing else depends on
    the wall clock.
    """
    library = _libfaketime()
    if library is None:
        return Result(title, skipped="no libfaketime: pip install '.[ops]'")
    folder = bench.folder()
    clock = folder / "clock"
    _set(clock, timedelta())
    env = {
        "LD_PRELOAD": library,
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    years: list[str] = []
    with removing_regions(), Stand(bench.repository, folder, env=env) as stand:

        def jump() -> None:
            for ahead in (YEARS, timedelta()):
                _set(clock, ahead)
                years.append(_year(env))
                time.sleep(3)

        with Trial(title, stand, bench.questions(stand)) as trial:
            trial.inject(jump)
            trial.recover()
        stubs = stand.container.stubs(DECODER)
        if not all("libfaketime" in Path(f"/proc/{s.pid}/maps").read_text() for s in stubs):
            raise RuntimeError("the decoder's process does not use the fake clock")
        trial.remark = f"a process with this clock saw the years {', '.join(years)}"
        return trial.result()


def _year(env: Mapping[str, str]) -> str:
    """The year as the server's processes see it."""
    command = (sys.executable, "-c", "import time; print(time.localtime().tm_year)")
    return subprocess.run(
        command, env={**os.environ, **env}, capture_output=True, text=True, check=True
    ).stdout.strip()


@contextmanager
def removing_regions(folder: Path = SHARED_MEMORY) -> Iterator[None]:
    """Remove what libfaketime leaves behind when a signal kills a process."""
    before = set(folder.glob(FAKETIME_REGIONS))
    try:
        yield
    finally:
        for region in set(folder.glob(FAKETIME_REGIONS)) - before:
            region.unlink(missing_ok=True)


def _set(clock: Path, ahead: timedelta) -> None:
    clock.write_text(f"{int(ahead.total_seconds()):+d}s\n", encoding="utf-8")


def _libfaketime() -> str | None:
    spec = importlib.util.find_spec("libfaketime")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    program = shutil.which("faketime")
    if program:
        folders.append(Path("/usr/lib"))
    for folder in folders:
        for found in folder.rglob("libfaketime*.so*"):
            return str(found)
    return None
