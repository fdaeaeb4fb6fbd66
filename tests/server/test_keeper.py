"""The keeper on its own, with processes that are harder to stop than tritonserver."""

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server import keeper
from tests.server import tiny

SOON = 5.0
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
        token = secrets.token_hex(4)
        self.region, self.foreign = (
            Path(f"/dev/shm/{name}_{token}_x") for name in ("mine", "other")
        )
        self.work_dir = folder / "work"
        self.work_dir.mkdir()
        self.region.touch()
        self.foreign.touch()
        read_end, write_end = os.pipe()
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
            pass_fds=(write_end,),
            start_new_session=True,
        )
        os.close(write_end)
        with os.fdopen(read_end) as report:
            self.reported = report.read()

    def cleaned_up(self) -> bool:
        return not self.region.exists() and not self.work_dir.exists() and self.foreign.exists()

    def __enter__(self) -> "Kept":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.region.unlink(missing_ok=True)
        self.foreign.unlink(missing_ok=True)


@pytest.fixture
def stubborn(tmp_path: Path) -> Iterator[tuple[Kept, int]]:
    """A process that ignores SIGTERM, and its child in its own session."""
    with Kept(tmp_path, sys.executable, "-c", STUBBORN) as kept:
        assert kept.process.stdout
        yield kept, int(kept.process.stdout.readline())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_ends_what_does_not_want_to(stubborn: tuple[Kept, int], number: int) -> None:
    kept, runaway = stubborn
    assert tiny.runs(int(kept.reported)) and tiny.runs(runaway)
    kept.process.send_signal(number)
    assert kept.process.wait(SOON) == 128 + signal.SIGKILL
    assert not tiny.runs(int(kept.reported)) and not tiny.runs(runaway)
    assert kept.cleaned_up()


def test_sigterm_leaves_time_to_finish(tmp_path: Path) -> None:
    script = "trap 'exit 3' TERM; echo ready; while :; do sleep 0.01; done"
    with Kept(tmp_path, "sh", "-c", script) as kept:
        assert kept.process.stdout and kept.process.stdout.readline()
        kept.process.terminate()
        assert kept.process.wait(SOON) == 3


def test_an_end_of_its_own_takes_the_children_along(tmp_path: Path) -> None:
    with Kept(tmp_path, "sh", "-c", "sleep 600 & echo $!; exit 7") as kept:
        assert kept.process.stdout
        child = int(kept.process.stdout.readline())
        assert kept.process.wait(SOON) == 7
        assert not tiny.runs(child)
        assert kept.cleaned_up()


def test_a_caller_that_has_gone(tmp_path: Path) -> None:
    with Kept(tmp_path, "sleep", "600", caller=os.getppid()) as kept:
        assert kept.process.wait(SOON) == 128 + signal.SIGKILL
        assert kept.cleaned_up()


def test_a_command_that_is_none(tmp_path: Path) -> None:
    with Kept(tmp_path, str(tmp_path / "nothing")) as kept:
        assert kept.process.wait(SOON) == keeper.CANNOT_EXECUTE
        assert kept.reported == ""
        assert kept.process.stderr
        error = kept.process.stderr.read()
        assert "No such file" in error and len(error.splitlines()) == 1
        assert kept.cleaned_up()
