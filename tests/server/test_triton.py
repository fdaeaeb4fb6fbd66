"""The life of a server: nothing may be left running, whatever stops it."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.http

from server import (
    PortInUseError,
    RepositoryError,
    StartError,
    TritonServer,
    ports,
)
from server.command import ENVIRONMENT, Address
from tests.conftest import ROOT
from tests.server import tiny
from tests.server.conftest import Start
from tests.server.tiny import Traces

SOON = 5.0


def plus_one(server: TritonServer, model: str = "plus_one") -> list[float]:
    with tritonclient.http.InferenceServerClient(server.http_url.split("://")[1]) as client:
        x = tritonclient.http.InferInput("x", [1, 3], "FP32")
        x.set_data_from_numpy(np.array([[1, 2, 3]], np.float32))
        return list(client.infer(model, [x]).as_numpy("y")[0])


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server that no test harms, in a folder that could break a shell and sys.path."""
    folder = tmp_path_factory.mktemp("my models (new); $(touch oops)")
    tiny.add_plus_one(folder)
    add_plus_two(folder)
    report = "import sys, numpy; print('stub', sys.version, sys.prefix, numpy.__file__, flush=True)"
    tiny.add_python(folder, "report", report)
    (folder / "numpy.py").write_text("raise ImportError('not from the working directory')")
    server = TritonServer(folder)
    before = Path.cwd()
    try:
        os.chdir(folder)
        server.start()
        os.chdir(before)
        yield server
    finally:
        os.chdir(before)
        server.kill()


def add_plus_two(repository: Path) -> None:
    """An ensemble that runs plus_one twice."""
    step = (
        'step {{ model_name: "plus_one" model_version: -1 '
        'input_map {{ key: "x" value: "{}" }} output_map {{ key: "y" value: "{}" }} }}'
    )
    steps = step.format("x", "between") + step.format("between", "y")
    text = tiny.config(
        "", tiny.X, tiny.Y, instances="", more=f"ensemble_scheduling {{ {steps} }}"
    ).replace('backend: ""', 'platform: "ensemble"')
    tiny.add_model(repository, "plus_two", text)


def test_paths_with_special_characters_work(shared: TritonServer) -> None:
    assert "touch oops" in str(shared.repository.resolve())
    assert plus_one(shared) == [2, 3, 4]


def test_memory_of_requests_is_returned_to_the_system(shared: TritonServer) -> None:
    """Bodies of many sizes at once, for which untuned glibc would keep memory in every heap."""
    process = psutil.Process(shared.pid)
    before = process.memory_full_info().uss
    with ThreadPoolExecutor(8) as callers:
        sizes = random.Random(0).choices(range(2**20, 16 * 2**20), k=160)
        assert set(callers.map(partial(refused, shared), sizes)) == {500}
    assert process.memory_full_info().uss - before < 48 * 2**20


def test_the_callers_environment_takes_precedence(plus_one_repository: Path, start: Start) -> None:
    name, other = next(iter(ENVIRONMENT)), "65536"
    server = start(plus_one_repository, env={name: other})
    environment = psutil.Process(server.pid).environ()
    assert environment.items() >= {**tiny.environment(), name: other}.items()


def refused(server: TritonServer, size: int) -> int:
    """The status for a body that is not a request."""
    url = f"{server.http_url}/v2/models/plus_one/infer"
    kind = {"Content-Type": "application/octet-stream"}
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(url, bytes(size), kind))
    return int(caught.value.code)


def test_an_ensemble_of_two(shared: TritonServer) -> None:
    assert plus_one(shared, "plus_two") == [3, 4, 5]


def test_stubs_run_this_python_with_its_packages(shared: TritonServer) -> None:
    assert f"stub {sys.version} {sys.prefix} {np.__file__}" in shared.read_log()


def test_a_running_server_cannot_be_started_again(shared: TritonServer) -> None:
    with pytest.raises(RuntimeError, match="already running"):
        shared.start()


def test_servers_do_not_disturb_each_other(
    shared: TritonServer, plus_one_repository: Path, start: Start
) -> None:
    start(plus_one_repository).kill()
    assert plus_one(shared) == [2, 3, 4]
    assert Traces.of(shared.pid).regions()


def test_from_start_to_stop(plus_one_repository: Path) -> None:
    with pytest.raises(KeyboardInterrupt), TritonServer(plus_one_repository) as server:
        traces = Traces.of(server.pid)
        assert server.is_alive()
        assert plus_one(server) == [2, 3, 4]
        with tritonclient.grpc.InferenceServerClient(server.grpc_url.split("://")[1]) as client:
            assert client.is_server_ready()
        assert "nv_inference_request_success" in tiny.get(server.metrics_url)
        assert len(traces.processes()) == 3  # keeper, tritonserver, one stub
        assert traces.regions()
        raise KeyboardInterrupt
    assert not server.is_alive()
    assert not traces.left()
    assert "successfully unloaded 'plus_one'" in server.read_log()


def test_a_log_truncated_by_others_can_still_be_read(
    plus_one_repository: Path, tmp_path: Path
) -> None:
    log = tmp_path / "tritonserver.log"
    log.write_text("of an earlier server\n" * 1000)
    with TritonServer(plus_one_repository, log=log) as server:
        assert "earlier" not in server.read_log()
        os.truncate(log, 0)
        server.stop()
        assert "successfully unloaded 'plus_one'" in server.read_log()


def test_stubs_exit_when_tritonserver_is_killed(plus_one_repository: Path, start: Start) -> None:
    server = start(plus_one_repository)
    traces, urls = Traces.of(server.pid), (server.http_url, server.grpc_url, server.metrics_url)
    os.kill(server.pid, signal.SIGKILL)
    assert traces.gone_within(SOON)
    assert server.wait() == 128 + signal.SIGKILL
    assert not server.is_alive()

    server.start()
    assert urls == (server.http_url, server.grpc_url, server.metrics_url)
    assert plus_one(server) == [2, 3, 4]


def test_kill_leaves_nothing(plus_one_repository: Path, start: Start) -> None:
    server = start(plus_one_repository)
    traces = Traces.of(server.pid)
    server.kill()
    assert not traces.left()
    server.stop()  # once more is harmless


def test_everything_exits_when_the_keeper_is_killed(
    plus_one_repository: Path, start: Start
) -> None:
    server = start(plus_one_repository)
    traces = Traces.of(server.pid)
    os.kill(traces.keeper, signal.SIGKILL)
    assert tiny.wait_for(lambda: not traces.processes(), SOON)
    assert not server.is_alive()
    server.stop()
    assert not traces.left()


CALLER = """
import pathlib, sys, time
from server import TritonServer
server = TritonServer(pathlib.Path(sys.argv[1])).start()
try:
    print(server.pid, flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    time.sleep(0.5)
    print("Signal" in server.read_log() or "undisturbed", flush=True)
"""


@pytest.fixture
def caller(plus_one_repository: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Another Python with its own server, in a process group as a terminal makes it."""
    with subprocess.Popen(
        [sys.executable, "-c", CALLER, str(plus_one_repository)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_ctrl_c_reaches_only_the_caller(caller: "subprocess.Popen[bytes]") -> None:
    assert caller.stdout and caller.stdout.readline()
    os.killpg(caller.pid, signal.SIGINT)
    assert caller.stdout.readline() == b"undisturbed\n"


def test_everything_exits_when_the_caller_is_killed(caller: "subprocess.Popen[bytes]") -> None:
    assert caller.stdout
    traces = Traces.of(int(caller.stdout.readline()))
    assert len(traces.processes()) == 3
    caller.kill()
    assert traces.gone_within(SOON)


def test_a_broken_model_is_named_with_its_reason(tmp_path: Path) -> None:
    tiny.add_python(tmp_path, "broken", tiny.FAILING)
    server = TritonServer(tmp_path)
    with pytest.raises(StartError, match=r"^broken: RuntimeError: no luck today\n.*model\.py\(3\)"):
        server.start()
    assert not server.is_alive()


def test_a_model_that_crashes_is_named(tmp_path: Path) -> None:
    tiny.add_python(tmp_path, "crashing", "import os; os.abort()")
    with pytest.raises(StartError, match=r"^crashing: Stub process .* it crashed"):
        TritonServer(tmp_path).start()


def test_a_model_that_loads_forever_times_out(plus_one_repository: Path, tmp_path: Path) -> None:
    tiny.add_python(plus_one_repository, "slow", tiny.SLOW)
    server = TritonServer(plus_one_repository, start_timeout=1.5, log=tmp_path / "log")
    began = time.monotonic()
    with pytest.raises(StartError, match=r"(?s)Not ready after 1.5 s.*ModelInstanceInitialize"):
        server.start()
    assert time.monotonic() - began < 1.5 + SOON
    assert "loading: slow:1" in (tmp_path / "log").read_text()


def test_the_start_is_repeated_if_a_free_port_was_taken(
    plus_one_repository: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        stolen = taken.getsockname()[1]
        http, grpc, _ = free_ports()
        offers = [
            Address("127.0.0.1", http, grpc, stolen),
            Address("127.0.0.1", stolen, grpc, http),
        ]
        choose = ports.choose
        monkeypatch.setattr(
            ports, "choose", lambda *args: offers.pop() if offers else choose(*args)
        )
        server = start(plus_one_repository)
    assert not offers
    assert stolen not in server.address.ports
    assert plus_one(server) == [2, 3, 4]


def free_ports() -> tuple[int, int, int]:
    address = ports.choose("127.0.0.1", None, None, None)
    return address.http_port, address.grpc_port, address.metrics_port


ACCIDENT = """import os, signal
        if not os.path.exists({seen!r}):
            open({seen!r}, "w").close()
            print("terminate called: 'boost::interprocess::lock_exception'", flush=True)
            os.kill(os.getppid(), signal.SIGABRT)"""


def test_the_start_is_repeated_after_a_transient_failure_of_triton(
    plus_one_repository: Path, start: Start
) -> None:
    seen = plus_one_repository.parent / "seen"
    tiny.add_python(plus_one_repository, "crashing", ACCIDENT.format(seen=str(seen)))
    server = start(plus_one_repository)
    assert seen.exists()
    assert plus_one(server) == [2, 3, 4]


def test_a_port_in_use_is_an_error_before_anything_runs(plus_one_repository: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = TritonServer(plus_one_repository, grpc_port=taken.getsockname()[1])
        with pytest.raises(PortInUseError):
            server.start()
    assert not server.is_alive()


def test_folders_that_are_not_repositories_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    reasons = {
        "missing": "there is no such folder",
        "file": "it is not a folder",
        ".": "no folder in it has a config.pbtxt",
    }
    for name, reason in reasons.items():
        with pytest.raises(RepositoryError, match=reason):
            TritonServer(tmp_path / name).start()


def test_a_repository_without_read_permission_is_not_reported_as_empty(
    plus_one_repository: Path,
) -> None:
    """As in a container whose user did not export the models."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        closed = Path(name, "models")
        shutil.copytree(plus_one_repository, closed)
        closed.chmod(0)
        Path(name).chmod(0o711)
        if os.getuid() == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(RepositoryError, match=r"may not read .*chmod"):
                TritonServer(closed).start()
        finally:
            os.seteuid(os.getuid())
            closed.chmod(0o700)


def test_before_the_first_start_there_is_no_address(plus_one_repository: Path) -> None:
    server = TritonServer(plus_one_repository)
    assert not server.is_alive()
    server.stop()
    with pytest.raises(RuntimeError, match="never started"):
        _ = server.http_url
