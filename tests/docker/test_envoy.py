"""Envoy with the chart's configuration in front of a server that is as slow as a test needs.

A proxy that stops loses nothing; bodies that never end exhaust neither its memory nor the servers.
"""

import http.client
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
import pytest
import yaml

from benchmarks.faults.proxies import TOKEN, Envoy
from tests.docker.harness import CHART, run
from tests.docker.test_helm import render

pytestmark = pytest.mark.proxy
IMAGE = "/v2/models/sam3_interactive/infer"
CLICK = "/v2/models/sam3_click_rle/infer"
HEALTH, INFERENCE = "grpc.health.v1.Health", "inference.GRPCInferenceService"
HEADERS = {"authorization": f"Bearer {TOKEN}"}


class Slow:
    """A stub server: request headers set how long a request takes and which status it gets."""

    def __init__(self) -> None:
        self._grpc = grpc.server(ThreadPoolExecutor(8))
        for service, method in ((HEALTH, "Check"), (INFERENCE, "ServerLive")):
            answer = {method: grpc.unary_unary_rpc_method_handler(_serving)}
            handler = grpc.method_handlers_generic_handler(service, answer)
            self._grpc.add_generic_rpc_handlers((handler,))
        self.grpc_port = self._grpc.add_insecure_port("127.0.0.1:0")
        self._grpc.start()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.http_port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._grpc.stop(None)
        self._server.shutdown()
        self._server.server_close()


def _serving(_request: bytes, context: Any) -> bytes:
    """SERVING for a health check, and true for ServerLive."""
    headers = dict(context.invocation_metadata())
    time.sleep(float(headers.get("x-seconds", 0)))
    return b"\x08\x01"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        time.sleep(float(self.headers.get("x-seconds", 0)))
        self._answer(int(self.headers.get("x-status", http.client.OK)))

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def _answer(self, status: int = http.client.OK) -> None:
        self.send_response(status)
        self.send_header("content-length", "0")
        self.end_headers()


Start = Callable[..., Envoy]


@pytest.fixture
def start(certificate: Path, tmp_path: Path, tool: Callable[[str, str], Path]) -> Iterator[Start]:
    """Run Envoy in front of one server, with its configuration changed by the given function."""
    program = tool("envoy", "pip install '.[ops]'")
    with ExitStack() as stack:

        def begin(change: Callable[[dict[str, Any]], None] = lambda _: None) -> Envoy:
            server = Slow()
            stack.callback(server.close)
            envoy = Envoy(program, tmp_path, certificate)
            envoy.configure([server])  # type: ignore[list-item]
            path = tmp_path / "envoy.yaml"
            config = yaml.safe_load(path.read_text())
            change(config)
            path.write_text(yaml.safe_dump(config))
            stack.enter_context(envoy)
            wait_until(lambda: ask(envoy, CLICK) == http.client.OK)
            return envoy

        yield begin


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def connect(envoy: Envoy) -> http.client.HTTPSConnection:
    context = ssl.create_default_context(cafile=str(envoy.folder / "tls.crt"))
    return http.client.HTTPSConnection("127.0.0.1", envoy.port, timeout=30, context=context)


def ask(envoy: Envoy, path: str, seconds: float = 0, status: int = http.client.OK) -> int:
    """Send a request that takes the server that long; its status."""
    connection = connect(envoy)
    try:
        wanted = {"x-seconds": str(seconds), "x-status": str(int(status))}
        connection.request("POST", path, b"{}", {**HEADERS, **wanted})
        return connection.getresponse().status
    finally:
        connection.close()


def observe(envoy: Envoy, path: str, method: str = "GET") -> tuple[int, str]:
    """A request that Prometheus and the kubelet may send."""
    connection = http.client.HTTPConnection("127.0.0.1", envoy.ports[9902], timeout=30)
    connection.request(method, path)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


@contextmanager
def unfinished(envoy: Envoy, count: int, size: int) -> Iterator[None]:
    """Start uploads of new images that stop one byte before the end, or when refused."""
    with ExitStack() as stack:
        for _ in range(count):
            connection = connect(envoy)
            stack.callback(connection.close)
            connection.putrequest("POST", IMAGE)
            for name, value in {**HEADERS, "content-length": str(size + 1)}.items():
                connection.putheader(name, value)
            connection.endheaders()
            with suppress(OSError):  # reset, once earlier ones have filled the memory
                connection.send(bytes(size))
        yield


def test_a_proxy_that_stops_loses_nothing(start: Start) -> None:
    """With the chart's own hook, except for its port and its pause."""
    envoy = start()
    proxy = render()["Deployment", "r-triton-sam3-proxy"]["spec"]["template"]["spec"]
    (container,) = proxy["containers"]
    program, option, script, name, pause = container["lifecycle"]["preStop"]["exec"]["command"]
    longest = re.search(r"\{1\.\.(\d+)\}", script)
    assert longest is not None
    assert int(pause) >= 30  # until cloud load balancers have checked three times
    assert int(pause) + int(longest[1]) < proxy["terminationGracePeriodSeconds"]
    script = script.replace("9901", str(envoy.ports[9901]))
    trusted = grpc.ssl_channel_credentials((envoy.folder / "tls.crt").read_bytes())
    channel = grpc.secure_channel(f"127.0.0.1:{envoy.port}", trusted)
    live = channel.unary_unary(f"/{INFERENCE}/ServerLive")
    metadata = tuple(HEADERS.items())
    assert live(b"", metadata=metadata, wait_for_ready=True, timeout=20)
    kept = connect(envoy)
    kept.request("POST", CLICK, b"{}", HEADERS)
    assert kept.getresponse().read() == b""
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(ask, envoy, CLICK, 4)
        slow_too = live.future(b"", metadata=(*metadata, ("x-seconds", "4")))
        time.sleep(0.5)
        assert observe(envoy, "/ready")[0] == http.client.OK
        hook = pool.submit(run, [program, option, script, name, "1"])
        wait_until(lambda: observe(envoy, "/ready")[0] == http.client.SERVICE_UNAVAILABLE)
        assert observe(envoy, "/live")[0] == http.client.OK
        kept.request("POST", CLICK, b"{}", HEADERS)
        answer = kept.getresponse()
        assert (answer.status, answer.getheader("connection")) == (http.client.OK, "close")
        assert ask(envoy, CLICK) == http.client.OK  # from a client that still finds it
        assert live(b"", metadata=metadata)
        assert not hook.done()
        assert slow.result() == http.client.OK
        assert slow_too.result()
        assert hook.result().returncode == 0, hook.result().stderr
    envoy.stop()


def test_error_responses_do_not_eject_a_server(start: Start) -> None:
    """Five bodies that are not JSON get five 500s, which must not eject the server for others."""

    def even_the_last(config: dict[str, Any]) -> None:
        for cluster in config["static_resources"]["clusters"][1:]:
            cluster["outlier_detection"]["max_ejection_percent"] = 100

    envoy = start(even_the_last)
    error = http.client.INTERNAL_SERVER_ERROR
    assert [ask(envoy, CLICK, status=error) for _ in range(8)] == [error] * 8
    time.sleep(2)  # longer than the check interval
    name = "envoy_cluster_outlier_detection_ejections_enforced_total"
    counted = re.findall(rf"^{name}{{[^}}]*}} (\d+)$", observe(envoy, "/metrics")[1], re.M)
    assert counted == ["0", "0"]


def test_the_kernel_checks_a_silent_server(start: Start) -> None:
    """By the kernel: a lost node closes no connection, and a request would wait for it."""
    envoy = start()
    config = yaml.safe_load((envoy.folder / "envoy.yaml").read_text())
    _, http_cluster, grpc_cluster = config["static_resources"]["clusters"]
    assert http_cluster["upstream_bind_config"] == grpc_cluster["upstream_bind_config"]
    (endpoints,) = http_cluster["load_assignment"]["endpoints"]
    address = endpoints["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]
    server = f"0100007F:{address['port_value']:04X}"
    keepalive = "02"

    def timers() -> list[str]:
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return [line[5][:2] for line in lines if (line[2], line[3]) == (server, "01")]

    with ThreadPoolExecutor() as pool:
        slow = pool.submit(ask, envoy, CLICK, 2)
        time.sleep(1)
        found = timers()
        assert slow.result() == http.client.OK
    assert found
    assert set(found) == {keepalive}


def test_unfinished_uploads_do_not_count_as_new_images(start: Start) -> None:
    """Only complete bodies count towards the limit of new images, which is 2."""
    envoy = start()
    with unfinished(envoy, 4, 1000):
        assert ask(envoy, IMAGE) == http.client.OK


def test_unfinished_uploads_do_not_exhaust_the_memory(start: Start) -> None:
    def shrink(config: dict[str, Any]) -> None:
        heap = config["overload_manager"]["resource_monitors"][0]["typed_config"]
        heap["max_heap_size_bytes"] = 2**28

    envoy = start(shrink)
    with unfinished(envoy, 5, 45 * 2**20):
        wait_until(lambda: ask(envoy, CLICK) == http.client.SERVICE_UNAVAILABLE)
        assert observe(envoy, "/live")[0] == http.client.OK
    wait_until(lambda: ask(envoy, CLICK) == http.client.OK)


def few_connections(config: dict[str, Any]) -> None:
    connections = config["overload_manager"]["resource_monitors"][1]["typed_config"]
    connections["max_active_downstream_connections"] = 3


def answers(envoy: Envoy) -> bool:
    """Whether it accepts a connection and a request."""
    try:
        return ask(envoy, CLICK) == http.client.OK
    except OSError:
        return False


def test_connections_are_limited_and_silent_ones_closed(start: Start) -> None:
    envoy = start(few_connections)
    with ExitStack() as stack:

        def refused() -> bool:
            connection = stack.enter_context(
                socket.create_connection(("127.0.0.1", envoy.port), timeout=5)
            )
            connection.settimeout(0.3)
            try:
                return connection.recv(1) == b""
            except ConnectionResetError:
                return True
            except TimeoutError:
                return False

        assert [refused() for _ in range(3)] == [False] * 3
        assert refused()
        assert observe(envoy, "/live")[0] == http.client.OK
        assert not answers(envoy)
        wait_until(lambda: answers(envoy))  # while all of them are still open here


def test_connections_without_requests_are_closed(start: Start) -> None:
    """After TLS; with a shorter time than the configuration's."""

    def impatient(config: dict[str, Any]) -> None:
        few_connections(config)
        (chain,) = config["static_resources"]["listeners"][1]["filter_chains"]
        options = chain["filters"][0]["typed_config"]["common_http_protocol_options"]
        assert int(options["idle_timeout"].removesuffix("s")) <= 120
        options["idle_timeout"] = "3s"

    envoy = start(impatient)
    with ExitStack() as stack:
        for _ in range(3):
            connection = connect(envoy)
            stack.callback(connection.close)
            connection.connect()
        assert not answers(envoy)
        wait_until(lambda: answers(envoy))


def test_rejections_are_counted_in_the_metric_of_the_alert(start: Start) -> None:
    envoy = start()
    rules = yaml.safe_load((CHART / "files" / "rules.yml").read_text())["groups"][1]["rules"]
    everything = " ".join(re.sub(r"\{[^}]*\}", "", rule["expr"]) for rule in rules)
    series = set(re.findall(r"envoy_\w+", everything))
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(envoy, IMAGE, 1), range(8)))
    refused = answers.count(http.client.TOO_MANY_REQUESTS)
    assert refused > 0
    text = observe(envoy, "/metrics")[1]
    found = {
        name: int(value)
        for name, labels, value in re.findall(r"^(envoy_\w+)\{([^}]*)\} (\d+)$", text, re.M)
        if "_cluster_" not in name or 'envoy_cluster_name="sam3_http"' in labels
    }
    assert series <= set(found)
    assert 'envoy_http_downstream_rq_xx{envoy_response_code_class="5",' in text
    assert found["envoy_cluster_upstream_rq_active_overflow"] == refused
    assert found["envoy_cluster_upstream_rq_total"] >= 8 - refused
    assert TOKEN not in text


def test_nothing_else_of_envoys_admin_interface_is_reachable(start: Start) -> None:
    envoy = start()
    for path in ("/", "/stats", "/config_dump", "/certs", "/metrics/../config_dump", "/clusters"):
        assert observe(envoy, path)[0] == http.client.NOT_FOUND, path
    for path in ("/quitquitquit", "/healthcheck/fail", "/drain_listeners", "/metrics", "/ready"):
        assert observe(envoy, path, "POST")[0] == http.client.NOT_FOUND, path
    assert observe(envoy, "/live") == (http.client.OK, "")
