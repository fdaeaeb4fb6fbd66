"""The keeper on its own, with processes that are harder to stop than tritonserver."""

import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import psutil
import pytest

from server import keeper
from tests.server import tiny

SOON = 5.0
PATIENCE = 20.0
"""Seconds until what a keeper or its command should have written is given up."""
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
runaway = subprocess.Popen(["sleep", "600"], start_new_session=True)
print(runaway.pid, flush=True)
time.sleep(600)
"""


class Kept:
    """A keeper over `command`, with a region and a folder to clean up."""

    def __init__(self, folder: Path, *command: str, caller: int | None = None) -> None:
        self._token = token = secrets.token_hex(4)
        self.region, self.foreign = (
            Path(f"/dev/shm/{name}_{token}_x") for name in ("mine", "other")
        )
        self.work_dir = folder / "work"
        self.work_dir.mkdir()
        self.region.touch()
        self.foreign.touch()
        self._report, write_end = os.pipe()
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", keeper.__file__),
                f"--caller={caller or os.getpid()}",
                "--grace=0.2",
                f"--shm-prefix=mine_{token}_",
                f"--work-dir={self.work_dir}",
                f"--report-fd={write_end}",
                *("--", *command),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "KEPT": token},
            pass_fds=(write_end,),
            start_new_session=True,
        )
        os.close(write_end)

    @cached_property
    def reported(self) -> str:
        """What the keeper reports, which ends before its command does."""
        report = b""
        while more := os.read(_readable(self._report), 100):
            report += more
        return report.decode()

    def line(self) -> str:
        """The next line that the command prints."""
        assert self.process.stdout
        _readable(self.process.stdout.fileno())
        return self.process.stdout.readline()

    def cleaned_up(self) -> bool:
        return not self.region.exists() and not self.work_dir.exists() and self.foreign.exists()

    def __enter__(self) -> "Kept":
        return self

    def __exit__(self, *error: object) -> None:
        """Also end what a broken keeper has left: it would hold the pipes for minutes."""
        self.process.kill()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("KEPT") == self._token:
                    process.kill()
        self.process.communicate(timeout=SOON)
        os.close(self._report)
        self.region.unlink(missing_ok=True)
        self.foreign.unlink(missing_ok=True)


def _readable(file: int) -> int:
    """The file, once there is something to read or it has ended."""
    assert select.select([file], [], [], PATIENCE)[0], f"nothing came within {PATIENCE:g} s"
    return file


@pytest.fixture
def stubborn(tmp_path: Path) -> Iterator[tuple[Kept, int]]:
    """A process that ignores SIGTERM, and its child in its own session."""
    with Kept(tmp_path, sys.executable, "-c", STUBBORN) as kept:
        yield kept, int(kept.line())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_command_that_ignores_sigterm_is_killed(stubborn: tuple[Kept, int], number: int) -> None:
    kept, runaway = stubborn
    assert tiny.runs(int(kept.reported)) and tiny.runs(runaway)
    kept.process.send_signal(number)
    assert kept.process.wait(SOON) == 128 + signal.SIGKILL
    assert not tiny.runs(int(kept.reported)) and not tiny.runs(runaway)
    assert kept.cleaned_up()


def test_sigterm_leaves_time_to_finish(tmp_path: Path) -> None:
    script = "trap 'exit 3' TERM; echo ready; while :; do sleep 0.01; done"
    with Kept(tmp_path, "sh", "-c", script) as kept:
        assert kept.line()
        kept.process.terminate()
        assert kept.process.wait(SOON) == 3


def test_children_are_killed_when_the_command_exits(tmp_path: Path) -> None:
    with Kept(tmp_path, "sh", "-c", "sleep 600 & echo $!; exit 7") as kept:
        child = int(kept.line())
        assert kept.process.wait(SOON) == 7
        assert not tiny.runs(child)
        assert kept.cleaned_up()


def test_everything_ends_when_the_caller_disappears(tmp_path: Path) -> None:
    with Kept(tmp_path, "sleep", "600", caller=os.getppid()) as kept:
        assert kept.process.wait(SOON) == 128 + signal.SIGKILL
        assert kept.cleaned_up()


def test_a_command_that_cannot_be_executed(tmp_path: Path) -> None:
    with Kept(tmp_path, str(tmp_path / "nothing")) as kept:
        assert kept.process.wait(SOON) == keeper.CANNOT_EXECUTE
        assert kept.reported == ""
        assert kept.process.stderr
        error = kept.process.stderr.read()
        assert "No such file" in error and len(error.splitlines()) == 1
        assert kept.cleaned_up()


def test_a_second_signal_does_not_prolong_the_grace_period(stubborn: tuple[Kept, int]) -> None:
    kept, _ = stubborn
    until = time.monotonic() + SOON
    while kept.process.poll() is None and time.monotonic() < until:
        kept.process.terminate()
        time.sleep(0.05)
    assert kept.process.poll() == 128 + signal.SIGKILL
