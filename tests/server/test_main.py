"""`python -m server` as a person, a terminal and a service manager use it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.server import tiny
from tests.server.tiny import Traces

FREE_PORTS = ("--http-port=0", "--grpc-port=0", "--metrics-port=0")
A_FEW_SECONDS = 10.0


def command(repository: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "server", str(repository), *FREE_PORTS, *options]


@contextmanager
def running(repository: Path) -> Iterator["subprocess.Popen[str]"]:
    """The command in its own process group, as a terminal starts it."""
    with subprocess.Popen(
        command(repository),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()  # harmless if it has exited; the keeper stops the rest


def tritonserver_below(process: "subprocess.Popen[str]") -> int:
    """Wait for its process id: a grandchild of the command."""
    deadline = time.monotonic() + A_FEW_SECONDS
    while time.monotonic() < deadline:
        for keeper in tiny.children(process.pid):
            for pid in tiny.children(keeper):
                if b"tritonserver\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
        time.sleep(0.02)
    raise AssertionError("no tritonserver was started")


def ctrl_c(process: "subprocess.Popen[str]") -> None:
    os.killpg(process.pid, signal.SIGINT)


def terminate(process: "subprocess.Popen[str]") -> None:
    process.terminate()


def test_prints_its_urls_in_one_line_and_ends_on_sigterm(plus_one_repository: Path) -> None:
    with running(plus_one_repository) as process:
        assert process.stdout and process.stderr
        http, grpc, metrics = process.stdout.readline().split()
        traces = Traces.of(tritonserver_below(process))
        assert tiny.get(f"{http}/v2/health/ready") == ""
        assert grpc.startswith("grpc://127.0.0.1:")
        assert "nv_inference_count" in tiny.get(metrics)
        terminate(process)
        assert process.wait(A_FEW_SECONDS) == 0
        assert not traces.left()
        assert process.stdout.read() == process.stderr.read() == ""


def test_ctrl_c_twice_while_running(plus_one_repository: Path) -> None:
    with running(plus_one_repository) as process:
        assert process.stdout and process.stdout.readline()
        traces = Traces.of(tritonserver_below(process))
        ctrl_c(process)
        time.sleep(0.5)  # tritonserver needs two seconds to unload
        ctrl_c(process)
        assert process.wait(A_FEW_SECONDS) == 0
        assert not traces.left()


@pytest.mark.parametrize("end", [ctrl_c, terminate])
def test_can_be_stopped_while_a_model_loads(tmp_path: Path, end: object) -> None:
    assert callable(end)
    tiny.add_python(tmp_path, "slow", tiny.SLOW)
    with running(tmp_path) as process:
        traces = Traces.of(tritonserver_below(process))
        assert tiny.wait_for(traces.regions, A_FEW_SECONDS)
        end(process)
        assert process.wait(A_FEW_SECONDS) == 0
        assert not traces.left()


@pytest.mark.parametrize("delay", [0.0, 0.03, 0.06])
def test_can_be_stopped_at_any_moment_of_the_start(plus_one_repository: Path, delay: float) -> None:
    """From the first sign of a keeper, before anything is served."""
    with running(plus_one_repository) as process:
        keepers = tiny.wait_for(lambda: tiny.children(process.pid), A_FEW_SECONDS)
        time.sleep(delay)
        terminate(process)
        assert process.wait(A_FEW_SECONDS) == 0
        assert tiny.wait_for(lambda: not any(map(tiny.runs, keepers)), A_FEW_SECONDS)


def test_a_server_that_dies_is_reported(plus_one_repository: Path) -> None:
    with running(plus_one_repository) as process:
        assert process.stdout and process.stderr and process.stdout.readline()
        traces = Traces.of(tritonserver_below(process))
        os.kill(traces.session, signal.SIGKILL)
        assert process.wait(A_FEW_SECONDS) == 1
        assert "tritonserver exited unexpectedly (status 137)" in process.stderr.read()
        assert not traces.left()


def run(repository: Path, *options: str) -> tuple[int, str, str]:
    done = subprocess.run(
        command(repository, *options), cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_a_broken_model_exits_with_1_and_its_reason(tmp_path: Path) -> None:
    tiny.add_python(tmp_path / "models", "broken", tiny.FAILING)
    log = tmp_path / "log"
    status, out, err = run(tmp_path / "models", f"--log={log}")
    assert (status, out) == (1, "")
    reason, place, where = err.splitlines()
    assert reason == "broken: RuntimeError: no luck today"
    assert place.strip().endswith("model.py(3): initialize")
    assert where == f"See {log} for all of its output."
    assert "failed to load 'broken'" in log.read_text()


def test_invalid_arguments_exit_with_2_and_one_sentence(plus_one_repository: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases = [
            ((plus_one_repository / "nowhere",), "there is no such folder"),
            ((plus_one_repository, f"--http-port={port}"), f"Cannot use 127.0.0.1:{port} for HTTP"),
            ((plus_one_repository, f"--log={plus_one_repository}"), "Cannot write the log"),
        ]
        for arguments, message in cases:
            status, out, err = run(*arguments)  # type: ignore[arg-type]
            assert (status, out) == (2, "")
            assert message in err and len(err.splitlines()) == 1
