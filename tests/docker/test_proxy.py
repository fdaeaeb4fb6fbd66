"""Two real servers behind the shipped nginx and Envoy configurations.

Affinity keeps each image on one server; a server that is killed or drained under load loses no
request; nobody without a token, and nothing but segmentation, comes through.
"""

import json
import signal
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import pytest
import tritonclient.grpc as triton_grpc
from tritonclient.utils import InferenceServerException

from tests.docker.harness import Container
from tests.docker.proxies import TOKEN, Envoy, Nginx, Proxy
from triton_sam3 import Client, SAM3Error
from triton_sam3.protocol import digest

pytestmark = pytest.mark.proxy
SCHEMES = ("https", "grpcs")
HEADERS = {"authorization": f"Bearer {TOKEN}"}
BLACK = np.zeros((8, 8, 3), np.uint8)
WARM = digest(BLACK)
PROGRAMS = {"nginx": "apt-get install nginx", "envoy": "pip install '.[ops]'"}


@pytest.fixture(scope="module")
def servers(
    repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Container, Container]]:
    """Two servers; a test that ends one starts it again."""
    options = ("--host=127.0.0.1", "--drain-seconds=1", "--exit-seconds=4")
    with (
        Container(repository, tmp_path_factory.mktemp("one"), *options) as one,
        Container(repository, tmp_path_factory.mktemp("two"), *options) as two,
    ):
        yield one.wait_until_serving(), two.wait_until_serving()


@pytest.fixture(params=PROGRAMS)
def proxy(
    request: pytest.FixtureRequest,
    servers: tuple[Container, Container],
    certificate: Path,
    tmp_path: Path,
    tool: Callable[[str, str], Path],
) -> Iterator[Proxy]:
    program = tool(request.param, PROGRAMS[request.param])
    made = {"nginx": Nginx, "envoy": Envoy}[request.param](program, tmp_path, certificate)
    made.configure(servers)
    with made as running:
        wait_for(running)
        yield running


def wait_for(proxy: Proxy) -> None:
    """Until it has found its servers; with a picture that no test asks about."""
    with connect(proxy, "https") as client:
        client.segment(BLACK, points=[(5, 5)])


def connect(proxy: Proxy, scheme: str, **options: object) -> Client:
    trusted = proxy.folder / "tls.crt"
    return Client(proxy.url(scheme), headers=HEADERS, root_certificates=trusted, **options)  # type: ignore[arg-type]


def pictures(count: int) -> list[npt.NDArray[np.uint8]]:
    rng = np.random.default_rng(3)
    return list(rng.integers(0, 256, (count, 40, 50, 3), np.uint8))


def call(proxy: Proxy, path: str, body: bytes | None, headers: dict[str, str]) -> int:
    context = ssl.create_default_context(cafile=proxy.folder / "tls.crt")
    request = urllib.request.Request(proxy.url("https") + path, data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, context=context, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("scheme", SCHEMES)
def test_masks_are_those_of_the_server(
    proxy: Proxy, servers: tuple[Container, Container], scheme: str
) -> None:
    image = pictures(1)[0]
    with Client(f"http://127.0.0.1:{servers[0].http_port}") as direct:
        expected = direct.segment(image, boxes=[(5, 5, 40, 30)]).masks
    with connect(proxy, scheme) as client:
        np.testing.assert_array_equal(client.segment(image, boxes=[(5, 5, 40, 30)]).masks, expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_image_stays_on_one_server(proxy: Proxy, scheme: str) -> None:
    with connect(proxy, scheme) as client:
        for image in pictures(12):
            with client.open(image) as view:
                for x in (10, 30):
                    view.click(x, 20)
    time.sleep(0.5)  # Envoy writes its log in pieces
    placed = {image: found for image, found in proxy.servers_of_images().items() if image != WARM}
    assert len(placed) == 12
    assert {len(found) for found in placed.values()} == {1}
    assert len(set().union(*placed.values())) == 2
    assert not [record for record in proxy.records() if record["status"] == 404]  # none was missed


def test_nobody_enters_without_a_token(proxy: Proxy) -> None:
    for token in (None, "Bearer wrong", TOKEN, "bearer", f"Bearer {TOKEN} "):
        headers = {} if token is None else {"authorization": token}
        for path in ("/v2/health/ready", "/v2/models/sam3_interactive/config", "/"):
            status = call(proxy, path, None, headers)
            trimmed = token == f"Bearer {TOKEN} "  # HTTP knows no spaces around a header's value
            assert status in ((200, 404) if trimmed else (401, 403)), (token, path)
    with (
        Client(proxy.url("grpcs"), root_certificates=proxy.folder / "tls.crt") as client,
        pytest.raises(SAM3Error),
    ):
        client.segment(pictures(1)[0], points=[(5, 5)])


def test_nothing_but_segmentation_is_served(proxy: Proxy) -> None:
    for path in (
        "/v2/repository/index",
        "/v2/repository/models/sam3_prompt_decoder/unload",
        "/v2/models/sam3_prompt_decoder/../../repository/index",
        "/v2/models/sam3_prompt_decoder/..%2f..%2frepository/index",
        "/v2/models/sam3_image_encoder/infer",
        "/v2/models/sam3_interactive/stats",
        "/v2/models/sam3_interactive/trace/setting",
        "/v2/trace/setting",
        "/v2/logging",
        "/v2/systemsharedmemory/status",
        "/metrics",
        "/",
    ):
        for body in (None, b"{}"):
            assert call(proxy, path, body, HEADERS) in (400, 404), path


def test_grpc_serves_nothing_but_segmentation(proxy: Proxy) -> None:
    client = triton_grpc.InferenceServerClient(
        f"127.0.0.1:{proxy.port}", ssl=True, root_certificates=str(proxy.folder / "tls.crt")
    )
    assert client.is_server_ready(headers=HEADERS)
    for method in (
        client.get_model_repository_index,
        client.get_log_settings,
        client.get_system_shared_memory_status,
        client.get_trace_settings,
    ):
        with pytest.raises(InferenceServerException, match=r"404|UNIMPLEMENTED"):
            method(headers=HEADERS)
    client.close()


def test_methods_and_sizes_are_limited(proxy: Proxy) -> None:
    infer = "/v2/models/sam3_interactive/infer"
    assert call(proxy, infer, None, HEADERS) in (403, 404)
    assert call(proxy, "/v2/health/ready", b"{}", HEADERS) in (403, 404)
    assert call(proxy, infer, bytes(2**26 + 1), HEADERS) == 413
    for coding in ("gzip", "deflate", "identity"):
        assert call(proxy, infer, b"{}", {**HEADERS, "content-encoding": coding}) == 415


def test_a_body_in_a_million_chunks_ends_no_server(
    proxy: Proxy, servers: tuple[Container, Container]
) -> None:
    """Straight to Triton 2.51 it does: what a proxy gathers first arrives in one piece."""
    context = ssl.create_default_context(cafile=str(proxy.folder / "tls.crt"))
    path = "/v2/models/sam3_interactive/infer"
    lines = (f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {TOKEN}")
    head = "\r\n".join((*lines, "Transfer-Encoding: chunked", "Connection: close", "", ""))
    address = ("127.0.0.1", proxy.port)
    with (
        socket.create_connection(address, timeout=60) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        connection.sendall(head.encode() + b"1\r\nx\r\n" * 1_000_000 + b"0\r\n\r\n")
        assert connection.recv(15).split()[1] in (b"400", b"500")
    with connect(proxy, "https") as client:
        assert client.segment(BLACK, points=[(5, 5)]).masks.shape[0] == 1
    for server in servers:
        server.wait_until_serving()


def test_logs_tell_requests_but_neither_tokens_nor_pixels(proxy: Proxy) -> None:
    with connect(proxy, "https") as client:
        client.segment(pictures(1)[0], points=[(5, 5)])
    time.sleep(0.5)  # Envoy writes its log in pieces
    text = proxy.log.read_text(errors="replace")
    assert TOKEN not in text
    record = proxy.records()[-1]
    assert (record["status"], record["method"]) == (200, "POST")
    assert max(len(line) for line in text.splitlines()) < 1000


@dataclass
class Load:
    """Threads that ask about the same few pictures until told to stop, and what came of it."""

    proxy: Proxy
    scheme: str
    retries: int
    right: int = 0
    wrong: int = 0
    lost: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> "Load":
        with connect(self.proxy, self.scheme) as client:
            expected = [self._ask(client, image) for image in pictures(8)]
        for seed in range(2):
            self._threads.append(threading.Thread(target=self._repeat, args=(seed, expected)))
            self._threads[-1].start()
        self.wait_for(5)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, more: int) -> None:
        """Until so many more requests came to an end."""
        deadline, wanted = time.monotonic() + 120, self._ended + more
        while self._ended < wanted:
            assert time.monotonic() < deadline, "no answers come any more"
            time.sleep(0.05)

    @property
    def _ended(self) -> int:
        return self.right + self.wrong + len(self.lost)

    def _repeat(self, seed: int, expected: list[npt.NDArray[np.bool_]]) -> None:
        images, rng = pictures(8), np.random.default_rng(seed)
        with connect(self.proxy, self.scheme, retries=self.retries) as client:
            while not self._stop.is_set():
                i = int(rng.integers(len(images)))
                try:
                    same = np.array_equal(self._ask(client, images[i]), expected[i])
                except SAM3Error as error:
                    with self._lock:
                        self.lost.append(f"{type(error).__name__}: {error}")
                    continue
                with self._lock:
                    self.right, self.wrong = self.right + same, self.wrong + (not same)

    @staticmethod
    def _ask(client: Client, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        return client.segment(image, boxes=[(5, 5, 40, 30)]).masks


def harm(proxy: Proxy, victim: Container, fault: Callable[[], object]) -> None:
    """Do it under load over both protocols; nothing may be lost.

    Over HTTP the proxy alone hides it: the client sends nothing again. A gRPC request that has
    begun to leave nginx cannot be taken back, and is the client's to send again.
    """
    try:
        with Load(proxy, "https", 0) as http, Load(proxy, "grpcs", 4) as grpc:
            fault()
            http.wait_for(20)
            grpc.wait_for(20)
    finally:
        victim.start().wait_until_serving()
    for load in (http, grpc):
        assert (load.wrong, load.lost) == (0, [])
        assert load.right >= 25


def test_a_killed_server_loses_nothing(proxy: Proxy, servers: tuple[Container, Container]) -> None:
    victim = servers[0]

    def kill() -> None:
        for process in victim.descendants():
            process.signal(signal.SIGKILL)
        victim.process.wait(30)

    harm(proxy, victim, kill)


def test_a_drained_server_loses_nothing(proxy: Proxy, servers: tuple[Container, Container]) -> None:
    """nginx is told first, as an operator would; Envoy has to find out."""

    def drain() -> None:
        proxy.leave_out(servers[1])
        servers[1].stop()

    harm(proxy, servers[1], drain)


def test_the_load_would_notice_a_loss(proxy: Proxy) -> None:
    with Load(proxy, "https", 0) as load:
        proxy.stop()
        load.wait_for(3)
    assert load.lost
    assert load.wrong == 0


def test_json_is_logged(proxy: Proxy) -> None:
    call(proxy, '/v2/"quoted"', None, HEADERS)
    time.sleep(0.5)
    assert json.dumps(proxy.records()[-1])
