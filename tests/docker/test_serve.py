"""Process 1 of the container, with a real tritonserver under it."""

import http.server
import json
import re
import signal
import tempfile
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from tritonclient.utils import InferenceServerException

from benchmarks.fuzz.census import is_alive
from docker.entrypoint import serve as serving
from docker.entrypoint.__main__ import main
from docker.entrypoint.probes import ProbeFailed
from docker.entrypoint.serve import EXIT_UNHEALTHY, Options, arguments, serve
from server import installation, keeper
from server.command import Address
from server.errors import SetupError
from server.health import ENSEMBLE, Probe, canary_request
from tests.docker.harness import Container, free_ports
from tests.server import tiny
from tests.server.test_health import INPUTS, SCORES
from triton_sam3 import Client

IMAGE = np.random.default_rng(1).integers(0, 256, (80, 100, 3), np.uint8)
EVERYWHERE = Address("0.0.0.0", 8000, 8001, 8002)


def test_memory_of_requests_is_returned_to_the_system(container: Container) -> None:
    """As under `python -m server`, where a test counts the bytes."""
    assert container.triton().environ().items() >= tiny.environment().items()


@pytest.mark.parametrize("kind", ["systemsharedmemory", "cudasharedmemory"])
def test_shared_memory_is_refused_over_http(container: Container, kind: str) -> None:
    status, body = container.call(f"/v2/{kind}/region/a/register", b"{}")
    assert status == 403, body


def test_shared_memory_is_refused_over_grpc(container: Container) -> None:
    with (
        triton_grpc.InferenceServerClient(f"127.0.0.1:{container.grpc_port}") as client,
        pytest.raises(InferenceServerException, match="restricted"),
    ):
        client.register_system_shared_memory("a", "/a", 8)


def test_logs_are_json_lines(container: Container) -> None:
    records = container.records()
    assert {"time", "level", "source", "message"} == set().union(*records)
    assert any("Started HTTPService" in record["message"] for record in records)


GATED = """
import time
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        image = pb_utils.get_input_tensor_by_name(request, "image").as_numpy()
        while image.any() and not Path({gate!r}).exists():
            time.sleep(0.01)
        scores = np.full((1, 1, 3), 0.5, np.float32)
        return pb_utils.InferenceResponse([pb_utils.Tensor("iou_predictions", scores)])
"""
"""Answers black images, such as the canary's, at once, and others once the gate file exists."""


def test_sigterm_answers_what_is_in_flight_and_leaves_nothing(tmp_path: Path) -> None:
    """Requests in flight are answered even after Triton is told to stop, not only in the drain."""
    gate, models = tmp_path / "gate", tmp_path / "models"
    config = tiny.config("python", INPUTS, SCORES)
    tiny.add_model(models, ENSEMBLE, config, python=GATED.format(gate=str(gate)))
    one = Container(models, tmp_path, "--host=127.0.0.1", "--drain-seconds=0.5")
    leftover = Path("/dev/shm", f"triton_sam3_port{one.http_port}_of_a_crash")
    leftover.write_bytes(b"x")
    one.drain_mark.touch()  # also from a crash: the pod's volumes outlive the container
    with ThreadPoolExecutor(4) as pool, one:
        one.wait_until_serving()
        assert not leftover.exists()
        assert not one.drain_mark.exists()
        family = one.descendants()
        assert len(family) >= 3
        pending = [pool.submit(status_of_a_gated_request, one) for _ in range(4)]
        queued = f'nv_inference_pending_request_count{{model="{ENSEMBLE}",version="1"}} 3\n'
        metrics = f"http://127.0.0.1:{one.metrics_port}/metrics"
        assert tiny.wait_for(
            lambda: queued in tiny.get(metrics), 60
        )  # behind the one being executed
        one.process.send_signal(signal.SIGTERM)
        assert tiny.wait_for(lambda: "Signal (15) received" in one.log.read_text(), 60)
        assert not any(request.done() for request in pending)
        gate.touch()
        assert one.process.wait(180) == 0
        assert [request.result() for request in pending] == [200] * 4
        assert one.drain_mark.exists()
        assert not [process for process in family if is_alive(process.pid)]
        assert not list(Path("/dev/shm").glob(f"triton_sam3_port{one.http_port}_*"))


def status_of_a_gated_request(one: Container) -> int:
    probe, path = Probe("127.0.0.1", one.http_port), f"/v2/models/{ENSEMBLE}"
    header, pixels = canary_request(json.loads(probe.request(f"{path}/config", 60)[1]))
    return probe.request(f"{path}/infer", 120, (header, b"\1" * len(pixels)))[0]


def test_a_model_that_cannot_load_ends_it_with_an_error(repository: Path, tmp_path: Path) -> None:
    broken = tmp_path / "models"
    broken.mkdir()
    for model in repository.iterdir():
        if model.name != "sam3_prompt_decoder":
            (broken / model.name).symlink_to(model)
    with Container(broken, tmp_path, "--host=127.0.0.1") as one:
        assert one.process.wait(120) != 0
    assert any("sam3_prompt_decoder" in record["message"] for record in one.records())


def test_a_missing_repository_is_reported_in_one_line(tmp_path: Path) -> None:
    with Container(tmp_path / "nothing", tmp_path) as one:
        assert one.process.wait(30) == EXIT_UNHEALTHY
    (record,) = one.records()
    assert record["level"] == "fatal"
    assert "No model repository" in record["message"]


def test_a_name_as_the_host_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["serve", "models", "--host=localhost"])
    assert exited.value.code == 2
    assert "--host: invalid IPv4Address value: 'localhost'" in capsys.readouterr().err


def test_missing_room_for_temporary_files_is_reported_in_one_line(
    repository: Path, tmp_path: Path
) -> None:
    """As without a tmpfs at /tmp: a path that can be neither removed nor created."""
    one = Container(repository, tmp_path)
    one.drain_mark.mkdir()
    with one:
        assert one.process.wait(30) == EXIT_UNHEALTHY
    (record,) = one.records()
    assert record["level"] == "fatal"
    assert str(one.drain_mark) in record["message"]
    assert "mount a tmpfs" in record["message"]


def test_a_watched_server_is_stopped_when_its_decoder_dies(
    repository: Path, tmp_path: Path
) -> None:
    watch = ("--watch-seconds=0.5", "--watch-timeout=1.5", "--host=127.0.0.1")
    with Container(repository, tmp_path, *watch) as one:
        one.wait_until_serving()
        family = one.descendants()
        (stub,) = one.stubs("sam3_prompt_decoder")
        stub.kill()
        assert one.process.wait(120) == EXIT_UNHEALTHY
        assert not [process for process in family if is_alive(process.pid)]
    said = "".join(r["message"] for r in one.records() if r["source"] == "entrypoint")
    # Earlier failures may come from a busy machine, and do not stop the server on their own.
    assert re.findall(r"not alive \((\d) of 3\)", said)[-3:] == ["1", "2", "3"]


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_one_trace_from_the_client_to_the_decoder(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    received: list[bytes] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    (port,) = free_ports(1)
    collector = http.server.ThreadingHTTPServer(("127.0.0.1", port), Collector)
    threading.Thread(target=collector.serve_forever, args=(0.01,), daemon=True).start()
    url = f"--otlp-url=http://127.0.0.1:{port}/v1/traces"
    with Container(repository, tmp_path, "--host=127.0.0.1", "--drain-seconds=0", url) as one:
        one.wait_until_serving()  # its canary is not traced
        ports = {"http": one.http_port, "grpc": one.grpc_port}
        with Client(f"{protocol}://127.0.0.1:{ports[protocol]}") as client:
            client.segment(IMAGE, boxes=[(10, 10, 60, 60)])  # nor are requests without a context
            made = TracerProvider()
            monkeypatch.setattr(trace, "get_tracer", made.get_tracer)

            def arrived() -> bool:  # Triton exports every five seconds
                return b"sam3_prompt_decoder" in b"".join(received)

            tries = 0
            # In one run of three, a server that had just started exported no span of a request.
            while not arrived() and tries < 3:
                with made.get_tracer("caller").start_as_current_span("photo") as span:
                    # A new image each time: a kept one would pass through the decoder alone.
                    client.segment(np.roll(IMAGE, 1 + tries, axis=0), points=[(50, 40)])
                tries += 1
                tiny.wait_for(arrived, 12)
        assert one.stop() == 0
    collector.shutdown()
    collector.server_close()
    sent = b"".join(received)
    for model in (b"sam3_interactive", b"sam3_image_encoder", b"sam3_prompt_decoder"):
        assert model in sent
    trace_id = span.get_span_context().trace_id
    assert trace_id.to_bytes(16, "big") in sent or f"{trace_id:032x}".encode() in sent
    assert 1 <= sent.count(b"InferRequest") <= tries


def test_tracing_never_records_tensors() -> None:
    options = Options(Path("/models"), EVERYWHERE, Path("/x"), otlp_url="http://collector")
    assert "--trace-config=level=TIMESTAMPS" in arguments(options)
    assert not any("TENSORS" in argument for argument in arguments(options))
    silent = Options(Path("/models"), EVERYWHERE, Path("/x"))
    assert not any("trace" in argument for argument in arguments(silent))


def test_metrics_have_what_the_probes_need(container: Container) -> None:
    url = f"http://127.0.0.1:{container.metrics_port}/metrics"
    text = urllib.request.urlopen(url).read().decode()
    assert 'nv_inference_request_success{model="sam3_prompt_decoder",version="1"}' in text
    assert "nv_inference_request_summary_us" in text


@pytest.fixture
def without_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository to serve from this process, whose temporary files are the test's own."""
    found = installation.Installation(Path("tritonserver"))
    monkeypatch.setattr(installation, "find", lambda *_: found)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tiny.add_plus_one(tmp_path / "models")
    return tmp_path / "models"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_watched_server_is_stopped_only_by_consecutive_failures(
    without_triton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two failed checks in one week and one in the next are no reason."""
    checks = iter([False, False, True, False, False, True])
    end = tmp_path / "end"
    program = ("sh", "-c", 'until [ -e "$1" ]; do sleep 0.01; done', "sh", str(end))

    def check(*_: object) -> str:
        passes = next(checks, None)
        if passes is None:
            end.touch()
            raise SystemExit  # from the thread that watches
        if not passes:
            raise ProbeFailed("late")
        return "the canary was answered"

    monkeypatch.setattr(serving, "command_line", lambda *_, **__: program)
    monkeypatch.setattr(serving, "loaded", lambda *_: True)
    monkeypatch.setattr(serving, "live", check)
    address = Address("127.0.0.1", *free_ports(3))
    assert serve(Options(without_triton, address, tmp_path / "mark", watch_seconds=0.001)) == 0


def test_options_reach_triton_and_its_keeper(
    without_triton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawned: dict[str, Any] = {}

    def spawn(command: list[str], **options: Any) -> None:
        spawned.update(options, command=command)
        raise SetupError("that was all")

    monkeypatch.setattr(keeper, "spawn", spawn)
    options = ("--exit-seconds=77", "--otlp-url=http://collector", "--trace-rate=9")
    places = (f"--http-port={free_ports(1)[0]}", f"--drain-mark={tmp_path / 'mark'}")
    command_line = ("serve", str(without_triton), *places, *options, "--", "--id=x")
    assert main(command_line) == EXIT_UNHEALTHY
    # Of several values the last counts: requests in flight get this long, and the keeper waits.
    granted = [one for one in spawned["command"] if one.startswith("--exit-timeout-secs=")]
    assert granted[-1] == "--exit-timeout-secs=77"
    assert spawned["grace"] > 77
    assert "--trace-config=rate=9" in spawned["command"]
    assert spawned["command"][-1] == "--id=x"
    assert not list(tmp_path.glob("triton-sam3-port*"))  # removed, as it did not start
