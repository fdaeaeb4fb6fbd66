"""Probes against a real server: healthy, dead but reporting ready, busy, hung and gone."""

import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from docker.entrypoint import probes
from docker.entrypoint.__main__ import main
from docker.entrypoint.probes import (
    WORKERS,
    ProbeFailed,
    Target,
    live,
    loaded,
    ready,
    startup,
)
from server import TritonServer
from tests.client import misbehaving
from tests.docker.harness import Container, free_ports
from tests.model_repository.asking import connect
from triton_sam3 import Client, SAM3Error


@pytest.fixture
def disposable_container(repository: Path, tmp_path: Path) -> Iterator[Container]:
    """A server that the test may harm."""
    with Container(repository, tmp_path, "--host=127.0.0.1", "--drain-seconds=0") as one:
        yield one.wait_until_serving()


def test_a_working_server_passes_every_probe(container: Container) -> None:
    for probe in (startup, live, ready):
        assert probe(container.target, 60.0) == "the canary was answered"


@pytest.mark.parametrize("command", ["serve", "probe", "drain"])
def test_the_commands_and_their_options_are_explained(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f"python3 -m docker.entrypoint {command} " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([command, "--help"])
    options = capsys.readouterr().out.partition("--help")[2]
    assert options.count("(default:") == options.count("\n  --")


def test_the_command_says_why_and_exits_with_0_or_1(
    container: Container, capsys: pytest.CaptureFixture[str]
) -> None:
    ports = [f"--http-port={container.http_port}", f"--metrics-port={container.metrics_port}"]
    mark = f"--drain-mark={container.drain_mark}"
    assert main(["probe", "live", *ports, mark, "--timeout=60"]) == 0
    container.drain_mark.touch()
    try:
        assert main(["probe", "ready", *ports, mark]) == 1
        assert main(["probe", "live", *ports, mark, "--timeout=60"]) == 0  # drained, not dead
    finally:
        container.drain_mark.unlink()
    assert "ready: draining" in capsys.readouterr().err


def test_the_command_asks_where_the_server_listens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ports = free_ports(2)
    options = [f"--http-port={ports[0]}", f"--metrics-port={ports[1]}"]
    for host, asked in (("127.0.0.3", "127.0.0.3"), ("0.0.0.0", "127.0.0.1")):
        assert main(["probe", "live", f"--host={host}", *options, f"--drain-mark={tmp_path}"]) == 1
        assert f"nothing listens on {asked}:" in capsys.readouterr().err


def test_a_closed_port_fails_at_once(tmp_path: Path) -> None:
    http_port, metrics_port = free_ports(2)
    target = Target("127.0.0.1", http_port, metrics_port, tmp_path / "draining")
    for probe in (startup, live, ready):
        began = time.monotonic()
        with pytest.raises(ProbeFailed, match="nothing listens"):
            probe(target, 30.0)
        assert time.monotonic() - began < 15


@pytest.mark.parametrize("hang_up", [False, True])
def test_a_server_that_does_not_answer_fails_with_a_sentence(tmp_path: Path, hang_up: bool) -> None:
    with misbehaving.tcp(hang_up) as port:
        target = Target("127.0.0.1", port, port, tmp_path / "draining")
        for probe in (startup, live, ready):
            with pytest.raises(ProbeFailed, match="no answer from /"):
                probe(target, 0.5)


def test_a_dead_model_is_named_even_if_triton_is_not_ready_because_of_it(tmp_path: Path) -> None:
    """As from 26.04 on."""
    dead = (500, b'{"error":"Stub process \'sam3_mask_writer_0_1\' is not healthy."}')
    metrics, config, not_ready = (200, b""), (200, b"{}"), (400, b"")
    with misbehaving.http(metrics, *[config, dead] * 3, not_ready) as (url, _):
        port = int(url.rpartition(":")[2])
        with pytest.raises(ProbeFailed, match="'sam3_mask_writer_0_1' is not healthy"):
            ready(Target("127.0.0.1", port, port, tmp_path / "draining"), 10)


@pytest.mark.parametrize("status", [200, 400])
def test_a_server_whose_port_answers_counts_as_loaded(tmp_path: Path, status: int) -> None:
    """Otherwise a server that lost a model before the first check would never be watched."""
    with misbehaving.http((status, b"")) as (url, _):
        port = int(url.rpartition(":")[2])
        target = Target("127.0.0.1", port, port, tmp_path / "draining")
        assert loaded(target, 5)
    assert not loaded(target, 5)


def test_a_server_of_another_repository_fails(tmp_path: Path) -> None:
    from tests.server import tiny

    tiny.add_plus_one(tmp_path / "models")
    with TritonServer(tmp_path / "models") as server:
        address = server.address
        target = Target("127.0.0.1", address.http_port, address.metrics_port, tmp_path / "draining")
        for probe in (startup, live, ready):
            with pytest.raises(ProbeFailed, match="sam3_interactive is not served"):
                probe(target, 1.0)
        server.kill()  # a graceful shutdown takes seconds


@pytest.mark.parametrize("model", ["sam3_prompt_decoder", "sam3_image_reader", "sam3_mask_writer"])
def test_a_killed_model_is_noticed_though_triton_says_ready(
    disposable_container: Container, model: str
) -> None:
    for stub in disposable_container.stubs(model):
        stub.kill()
    deadline, said = time.monotonic() + 60, ""
    # By the name of one of its instances: a mere timeout would say less.
    while not re.search(rf"'{model}_\d+_\d+' is not healthy", said):
        assert time.monotonic() < deadline, f"a server without {model} counts as alive: {said}"
        try:
            said = live(disposable_container.target, 2.0)
        except ProbeFailed as failure:
            said = str(failure)
    began = time.monotonic()
    for probe in (live, ready):
        with pytest.raises(ProbeFailed, match="not healthy"):
            probe(disposable_container.target, 120.0)  # as on a CPU, where one image takes long
    assert time.monotonic() - began < 60, "callers got errors while the probes waited"
    # Which a probe without a canary would trust.
    assert disposable_container.call("/v2/health/ready")[0] == 200


def test_a_hung_decoder_is_noticed_and_recovers_or_exits(repository: Path, tmp_path: Path) -> None:
    """Once it resumes, the server answers again or exits.

    Resuming may crash Triton 2.51; if Triton has given up on it, the watch stops the server.
    """
    watch = ("--watch-seconds=2", "--watch-timeout=10")
    with Container(
        repository, tmp_path, "--host=127.0.0.1", "--drain-seconds=0", *watch
    ) as container:
        container.wait_until_serving()
        _hang_for_a_while(container)
        _wait_until_alive_or_ended(container, 120)


@pytest.fixture
def hanging(repository: Path, tmp_path: Path) -> Iterator[Callable[[str], Container]]:
    """Run a server one of whose models hangs while its processes are healthy, as in a deadlock.

    A suspended process is another fault, which Triton notices by itself.
    """
    models, mark = tmp_path / "models", tmp_path / "hung"
    with ExitStack() as stack:

        def begin(model: str) -> Container:
            shutil.copytree(repository, models)
            with (models / model / "1" / "model.py").open("a") as source:
                source.write(HANGING.format(mark=str(mark)))
            server = Container(models, tmp_path, "--host=127.0.0.1", "--drain-seconds=0")
            stack.enter_context(server).wait_until_serving()
            stack.callback(mark.unlink)
            mark.touch()
            return server

        yield begin


HANGING = """

class TritonPythonModel(TritonPythonModel):
    def execute(self, requests):
        import os, time

        while os.path.exists({mark!r}):
            time.sleep(0.05)
        return super().execute(requests)
"""


@pytest.mark.parametrize(
    ("model", "unnoticed"), [("sam3_image_reader", 0), ("sam3_mask_writer", 2)]
)
def test_a_model_that_hangs_is_named_though_others_finish(
    hanging: Callable[[str], Container], model: str, unnoticed: int
) -> None:
    """Each of the mask writer's two instances takes a canary before one has to wait."""
    server = hanging(model)
    with load(server, 1):
        for _ in range(unnoticed):
            with suppress(ProbeFailed):
                live(server.target, 3.0)
        for _ in range(3):
            with pytest.raises(ProbeFailed, match=f"; {model} finished nothing"):
                live(server.target, 3.0)


def test_a_mask_writer_at_work_on_long_requests_is_alive(container: Container) -> None:
    """Triton counts neither of the two in that time, and the canary waits for them."""
    with (
        connect(f"127.0.0.1:{container.grpc_port}") as ask,
        Client(f"grpc://127.0.0.1:{container.grpc_port}") as client,
        ThreadPoolExecutor(2) as pool,
    ):
        served = client.status().served
        assert served is not None
        arrays = _many_masks(served.mask_side)
        pending = [pool.submit(ask, "sam3_mask_writer", **arrays) for _ in range(2)]
        time.sleep(1)
        said = [live(container.target, 2.0) for _ in range(2)]
        assert not any(one.done() for one in pending), "too short to tell"
        for one in pending:
            one.result()
    assert all(answer.startswith("busy") for answer in said)


def _many_masks(side: int) -> dict[str, npt.NDArray[Any]]:
    """Those of one image, each of 16 megapixels: almost as many as are accepted."""
    return {
        "low_res_masks": np.ones((1, 256, 1, side, side), np.float16),
        "iou_predictions": np.ones((1, 256, 1), np.float32),
        "image_size": np.array([[4000, 4000]], np.int32),
    }


def _hang_for_a_while(container: Container) -> None:
    (stub,) = container.stubs("sam3_prompt_decoder")
    stub.suspend()
    try:
        with pytest.raises(ProbeFailed, match=r"finished nothing|not healthy"):
            live(container.target, 4.0)
    finally:
        stub.resume()


def _wait_until_alive_or_ended(container: Container, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while container.process.poll() is None:
        try:
            assert live(container.target, 10.0)
            return
        except ProbeFailed:
            assert time.monotonic() < deadline, "neither alive nor exited"
    assert container.process.returncode != 0


@contextmanager
def load(server: Container, callers: int) -> Iterator[None]:
    """New images through encoder and decoder alone, from that many callers at once."""
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    stop, answered = threading.Event(), threading.Event()

    def call() -> None:
        with Client(f"http://127.0.0.1:{server.http_port}", remember_images=0) as client:
            while not stop.is_set():
                try:
                    client.segment(image, boxes=[(1, 1, 60, 60)] * 4)
                    answered.set()
                except SAM3Error:
                    pass

    threads = [threading.Thread(target=call) for _ in range(callers)]
    for thread in threads:
        thread.start()
    try:
        assert answered.wait(120)
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_a_busy_server_is_alive_and_ready(container: Container) -> None:
    """Too little time for the canary while other requests are served: busy, not dead."""
    # From too short for any request up to long enough for the canary: in between is busy.
    timeouts = [0.05 * 1.3**n for n in range(20)]
    with load(container, 8):
        for probe in (live, ready):
            deadline, said = time.monotonic() + 60, ""
            for timeout in cycle(timeouts):
                with suppress(ProbeFailed):
                    said = probe(container.target, timeout)
                if said.startswith("busy"):
                    break
                assert time.monotonic() < deadline, f"never busy, last: {said}"


REFUSED = (503, b'{"error":"Exceeds maximum queue size 64"}')


def finished(count: int) -> tuple[int, bytes]:
    """Metrics by which every model has answered this many requests."""
    line = 'nv_inference_request_success{{model="{}",version="1"}} {}\n'
    return 200, "".join(line.format(model, count) for model in WORKERS).encode()


def test_a_full_queue_does_not_fail_a_server_that_finishes_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "RETRY_SECONDS", 30)  # too late: the canary is sent once
    with misbehaving.http(finished(1), (200, b"{}"), REFUSED, finished(2)) as (url, _):
        port = int(url.rpartition(":")[2])
        said = live(Target("127.0.0.1", port, port, tmp_path / "draining"), 20)
    assert said.startswith("busy: the canary was refused")


def test_one_error_does_not_fail_a_server_that_finishes_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "RETRY_SECONDS", 6)  # the canary is sent twice
    failed = (500, b'{"error":"the decoder ran out of memory on this request"}')
    config = (200, b"{}")
    with misbehaving.http(finished(1), config, failed, config, REFUSED, finished(2)) as (url, _):
        port = int(url.rpartition(":")[2])
        said = live(Target("127.0.0.1", port, port, tmp_path / "draining"), 11)
    assert said.startswith("busy: The canary inference failed: the decoder ran out of memory")


@pytest.mark.parametrize("question", ["startup", "live", "ready"])
def test_the_command_waits_as_long_as_it_is_told(question: str, tmp_path: Path) -> None:
    with misbehaving.tcp(hang_up=False) as port:
        target = (f"--http-port={port}", f"--metrics-port={port}")
        mark = f"--drain-mark={tmp_path / 'draining'}"
        began = time.monotonic()
        assert main(["probe", question, *target, mark, "--timeout=0.1"]) == 1
        assert time.monotonic() - began < 5
