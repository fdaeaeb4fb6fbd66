"""Two real servers behind the shipped nginx and Envoy configurations.

Affinity keeps each image on one server; a server that is killed or drained under load loses no
request; nobody gets through without a token, and nothing gets through but segmentation.
"""

import re
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import grpc  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt
import psutil
import pytest
import tritonclient.grpc as triton_grpc
from tritonclient.utils import InferenceServerException

from benchmarks.faults.load import Caller, Kind, Load, Question, answered_questions
from benchmarks.faults.proxies import TOKEN, Envoy, Nginx, Proxy, certify
from tests.docker.harness import Container
from tests.server import tiny
from triton_sam3 import Client, Overloaded, SAM3Error
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
    """Two servers; a test that stops one starts it again."""
    options = ("--host=127.0.0.1", "--drain-seconds=1", "--exit-seconds=4")
    with (
        Container(repository, tmp_path_factory.mktemp("one"), *options) as one,
        Container(repository, tmp_path_factory.mktemp("two"), *options) as two,
    ):
        yield one.wait_until_serving(), two.wait_until_serving()


@pytest.fixture(scope="module")
def questions(servers: tuple[Container, Container]) -> list[Question]:
    """The questions of the load, answered by a server without a proxy."""
    with Client(f"http://127.0.0.1:{servers[0].http_port}") as direct:
        return answered_questions(direct)


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
    """Wait until it has found its servers, with a picture that no test uses."""
    with connect(proxy, "https") as client:
        client.segment(BLACK, points=[(5, 5)])


def connect(
    proxy: Proxy, scheme: str, headers: Mapping[str, str] = HEADERS, **options: object
) -> Client:
    return Client(proxy.url(scheme), headers=headers, root_certificates=trusted(proxy), **options)  # type: ignore[arg-type]


def trusted(proxy: Proxy) -> Path:
    return proxy.folder / "tls.crt"


def pictures(count: int) -> list[npt.NDArray[np.uint8]]:
    rng = np.random.default_rng(3)
    return list(rng.integers(0, 256, (count, 40, 50, 3), np.uint8))


def wait_for_record(proxy: Proxy, image: npt.NDArray[np.uint8], count: int = 1) -> None:
    """Wait until the access log, which is flushed in pieces, has `count` records of an image."""

    def written() -> int:
        return sum(record["image"] == digest(image) for record in proxy.records())

    assert tiny.wait_for(lambda: written() >= count, 20)


def call(proxy: Proxy, path: str, body: bytes | None, headers: dict[str, str]) -> int:
    context = ssl.create_default_context(cafile=trusted(proxy))
    request = urllib.request.Request(proxy.url("https") + path, data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, context=context, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@contextmanager
def begun(proxy: Proxy, length: str) -> Iterator[ssl.SSLSocket]:
    """Send the head of a request, with `length` as its body's header, and yield the connection."""
    context = ssl.create_default_context(cafile=str(trusted(proxy)))
    path = "/v2/models/sam3_interactive/infer"
    lines = (f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {TOKEN}", length)
    with (
        socket.create_connection(("127.0.0.1", proxy.port), timeout=60) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        connection.sendall("\r\n".join((*lines, "Connection: close", "", "")).encode())
        yield connection


@pytest.mark.parametrize("scheme", SCHEMES)
def test_masks_are_the_same_through_a_proxy(
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
    wait_for_record(proxy, pictures(12)[-1], 3)
    placed = {image: found for image, found in proxy.servers_of_images().items() if image != WARM}
    assert len(placed) == 12
    assert {len(found) for found in placed.values()} == {1}
    assert len(set().union(*placed.values())) == 2
    assert not [
        record for record in proxy.records() if record["status"] == 404
    ]  # no click missed its image


@pytest.mark.parametrize("scheme", SCHEMES)
def test_too_many_new_images_are_rejected_but_clicks_are_not(proxy: Proxy, scheme: str) -> None:
    crowd, image = 12, pictures(1)[0]

    def encode(client: Client) -> str:
        try:
            client.segment(image, points=[(5, 5)])
        except Overloaded:
            return "refused"
        return "answered"

    # Over HTTP the path decides; the client's header does not count there.
    headers = HEADERS if scheme == "grpcs" else {**HEADERS, "x-sam3-work": "click"}
    with (
        connect(proxy, scheme, headers, retries=0, remember_images=0) as client,
        client.open(image) as view,
        ThreadPoolExecutor(crowd) as pool,
    ):
        pending = [pool.submit(encode, client) for _ in range(crowd)]
        clicks = [pool.submit(view.click, x, 20) for x in range(1, crowd)]
        assert {one.result() for one in pending} == {"answered", "refused"}
        for click in clicks:
            click.result()
    with connect(proxy, scheme, remember_images=0) as patient, ThreadPoolExecutor(4) as pool:
        again = [pool.submit(encode, patient) for _ in range(4)]
        assert {one.result() for one in again} == {"answered"}


def test_requests_without_a_token_are_rejected(proxy: Proxy) -> None:
    for token in (None, "Bearer wrong", TOKEN, "bearer", f"Bearer {TOKEN} "):
        headers = {} if token is None else {"authorization": token}
        for path in ("/v2/health/ready", "/v2/models/sam3_interactive/config", "/"):
            status = call(proxy, path, None, headers)
            trimmed = token == f"Bearer {TOKEN} "  # HTTP trims spaces around a header's value
            assert status in ((200, 404) if trimmed else (401, 403)), (token, path)
    with (
        Client(proxy.url("grpcs"), root_certificates=trusted(proxy)) as client,
        pytest.raises(SAM3Error),
    ):
        client.segment(pictures(1)[0], points=[(5, 5)])


@pytest.fixture
def nginx(
    servers: tuple[Container, Container],
    certificate: Path,
    tmp_path: Path,
    tool: Callable[[str, str], Path],
) -> Nginx:
    """A configured nginx, for the test to change and start."""
    made = Nginx(tool("nginx", PROGRAMS["nginx"]), tmp_path, certificate)
    made.configure(servers)
    return made


def test_nginx_takes_new_tokens_and_certificates_with_a_reload(
    nginx: Nginx, tmp_path: Path, tool: Callable[[str, str], Path]
) -> None:
    new = {"authorization": "Bearer a-token-of-another-tenant"}
    with nginx:
        assert call(nginx, "/v2/health/ready", None, HEADERS) == 200
        assert call(nginx, "/v2/health/ready", None, new) == 401
        tokens = tmp_path / "tokens.conf"
        replacement = tmp_path / "replacement"
        replacement.write_text(f'"{new["authorization"]}" another;\n')
        replacement.replace(tokens)
        (tmp_path / "later").mkdir()
        certify(tool("openssl", "apt-get install openssl"), tmp_path / "later")
        for name in ("tls.crt", "tls.key"):
            (tmp_path / "later" / name).replace(tmp_path / name)
        nginx.reload()
        assert call(nginx, "/v2/health/ready", None, new) == 200  # the new certificate is trusted
        assert call(nginx, "/v2/health/ready", None, HEADERS) == 401


def test_nginx_counts_a_tenant_however_its_token_is_written(nginx: Nginx, tmp_path: Path) -> None:
    """It compares case-insensitively, and would count every spelling separately."""
    config = tmp_path / "nginx.conf"
    config.write_text(config.read_text().replace("limit_conn tenants 64", "limit_conn tenants 1"))
    shouted = {"authorization": HEADERS["authorization"].upper()}

    def refused() -> bool:
        return call(nginx, "/v2/health/ready", None, shouted) == 429

    with nginx, begun(nginx, "Content-Length: 2"):  # its place is held until its body comes
        assert tiny.wait_for(refused, 20)
    assert {record["tenant"] for record in nginx.records()} == {nginx.tenant}


def test_nginx_can_keep_a_place_for_new_images_of_other_tenants(
    nginx: Nginx, tmp_path: Path
) -> None:
    """A tenant whose uploads never end occupies no more than its own; clicks are not counted."""
    config, tokens = tmp_path / "nginx.conf", tmp_path / "tokens.conf"
    places = re.search(r"limit_conn encodings (\d+);", config.read_text())
    assert places is not None
    fewer = f"limit_conn encodings_of_tenant {int(places[1]) - 1};"
    config.write_text(re.sub(r"limit_conn encodings_of_tenant \d+;", fewer, config.read_text()))
    other = {"authorization": "Bearer a-token-of-another-tenant"}
    tokens.write_text(tokens.read_text() + f'"{other["authorization"]}" another;\n')
    image, click = (f"/v2/models/{name}/infer" for name in ("sam3_interactive", "sam3_click_rle"))

    with nginx, ExitStack() as stack:
        for _ in range(int(places[1])):
            stack.enter_context(begun(nginx, "Content-Length: 2"))
        assert tiny.wait_for(lambda: call(nginx, image, b"{}", HEADERS) == 429, 20)
        assert call(nginx, click, b"{}", HEADERS) != 429
        assert call(nginx, image, b"{}", other) != 429


def test_nginx_closes_connections_that_stay_silent(nginx: Nginx) -> None:
    """Before TLS; there are only so many, and they need no token."""
    with (
        nginx,
        socket.create_connection(("127.0.0.1", nginx.port), timeout=20) as connection,
    ):
        assert connection.recv(1) == b""


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
        f"127.0.0.1:{proxy.port}", ssl=True, root_certificates=str(trusted(proxy))
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
    rpc = "/inference.GRPCInferenceService/ModelInfer"
    for coding in ("gzip", "deflate"):
        assert call(proxy, rpc, b"", {**HEADERS, "grpc-encoding": coding}) == 415
    assert call(proxy, rpc, b"", {**HEADERS, "grpc-encoding": "identity"}) != 415


def test_a_body_in_a_million_chunks_crashes_no_server(
    proxy: Proxy, servers: tuple[Container, Container]
) -> None:
    """It crashes Triton 2.51 directly, but a proxy buffers the body and sends it in one piece."""
    with begun(proxy, "Transfer-Encoding: chunked") as connection:
        connection.sendall(b"1\r\nx\r\n" * 1_000_000 + b"0\r\n\r\n")
        assert connection.recv(15).split()[1] in (b"400", b"500")
    with connect(proxy, "https") as client:
        assert client.segment(BLACK, points=[(5, 5)]).masks.shape[0] == 1
    for server in servers:
        assert server.process.poll() is None
        server.wait_until_serving()


def test_a_body_labelled_as_a_form_crashes_no_server(
    proxy: Proxy, servers: tuple[Container, Container]
) -> None:
    """As curl's default is; Triton 2.51 would parse it as one."""
    form = {**HEADERS, "content-type": "application/x-www-form-urlencoded"}
    status = call(proxy, "/v2/models/sam3_interactive/infer", b"x" * 9 * 2**20, form)
    assert status in (400, 500)
    for server in servers:
        assert server.process.poll() is None
        server.wait_until_serving()


def test_logs_show_requests_but_neither_tokens_nor_pixels(proxy: Proxy) -> None:
    """As JSON, whatever characters a path contains."""
    (image,) = pictures(1)
    call(proxy, '/v2/"quoted"', None, HEADERS)
    with connect(proxy, "https") as client:
        client.segment(image, points=[(5, 5)])
    wait_for_record(proxy, image)
    text = proxy.log.read_text(errors="replace")
    assert TOKEN not in text
    records = proxy.records()
    assert any("quoted" in record["path"] for record in records)
    assert (records[-1]["status"], records[-1]["method"]) == (200, "POST")
    assert max(len(line) for line in text.splitlines()) < 1000


def test_logs_show_the_tenant_and_the_grpc_status(proxy: Proxy) -> None:
    client = triton_grpc.InferenceServerClient(
        f"127.0.0.1:{proxy.port}", ssl=True, root_certificates=str(trusted(proxy))
    )
    with pytest.raises(InferenceServerException) as refused:
        client.get_model_config("none-of-ours", headers=HEADERS)
    client.close()
    assert call(proxy, "/v2/health/ready", None, {"x-forwarded-for": "192.0.2.1"}) in (401, 403)

    def written() -> list[dict[str, object]]:
        return [one for one in proxy.records() if str(one["path"]).endswith("/ModelConfig")]

    def strangers() -> list[dict[str, object]]:
        return [one for one in proxy.records() if one["status"] in (401, 403)]

    assert tiny.wait_for(lambda: written() and strangers(), 20)  # the log is flushed in pieces
    (record,) = written()
    assert record["tenant"] == proxy.tenant
    assert record["address"] == "127.0.0.1"
    assert refused.value.status() == "StatusCode.NOT_FOUND"
    assert (record["status"], int(str(record["grpc"]))) == (200, grpc.StatusCode.NOT_FOUND.value[0])
    assert [one["tenant"] for one in strangers()] in ([""], [None])
    assert [one["address"] for one in strangers()] == ["127.0.0.1"]  # and not the forwarded one


@contextmanager
def load(proxy: Proxy, questions: list[Question], scheme: str, retries: int) -> Iterator[Load]:
    """Two clients that send the same few pictures; every error counts as a loss."""
    options = {"headers": HEADERS, "root_certificates": trusted(proxy), "retries": retries}
    callers = [Caller(proxy.url(scheme), options)] * 2
    with Load(callers, questions, timeout=30, hidden=(SAM3Error,)) as running:
        running.settle()
        yield running


def wait_for_more(load: Load, more: int) -> None:
    """Wait until that many more requests have finished."""
    deadline, wanted = time.monotonic() + 120, load.ended + more
    while load.ended < wanted:
        assert time.monotonic() < deadline, "no more answers arrive"
        time.sleep(0.05)


def harm(
    proxy: Proxy,
    questions: list[Question],
    victim: Container,
    fault: Callable[[], object],
    http_retries: int = 0,
) -> None:
    """Inject the fault under load over both protocols; nothing may be lost.

    Over HTTP the proxy alone hides it: the client does not retry. A gRPC request that nginx has
    begun to send cannot be taken back, and is the client's to retry.
    """
    http_load = load(proxy, questions, "https", http_retries)
    try:
        with http_load as http, load(proxy, questions, "grpcs", 4) as grpc:
            fault()
            wait_for_more(http, 20)
            wait_for_more(grpc, 20)
    finally:
        victim.start().wait_until_serving()
    for outcomes in (http.outcomes, grpc.outcomes):
        assert [one.said for one in outcomes if one.kind is not Kind.RIGHT] == []
        assert len(outcomes) >= 25


def test_a_killed_server_loses_nothing(
    proxy: Proxy, servers: tuple[Container, Container], questions: list[Question]
) -> None:
    victim = servers[0]

    def kill() -> None:
        for process in victim.descendants():
            with suppress(psutil.NoSuchProcess):  # killing one may end another
                process.kill()
        victim.process.wait(30)

    harm(proxy, questions, victim, kill)


def test_a_drained_server_loses_nothing(
    proxy: Proxy, servers: tuple[Container, Container], questions: list[Question]
) -> None:
    """nginx is told first, as an operator would; Envoy has to find out.

    When told, nginx closes its idle connections: a request just being sent on one is the client's
    to retry.
    """

    def drain() -> None:
        proxy.leave_out(servers[1])
        servers[1].stop()

    harm(proxy, questions, servers[1], drain, http_retries=4 if isinstance(proxy, Nginx) else 0)


def test_the_load_would_notice_a_loss(proxy: Proxy, questions: list[Question]) -> None:
    with load(proxy, questions, "https", 0) as running:
        proxy.stop()
        wait_for_more(running, 3)
    assert {one.kind for one in running.outcomes} == {Kind.RIGHT, Kind.LOST}
