"""Headers, TLS and retries on real connections."""

import asyncio
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
import numpy as np
import psutil
import pytest
import trustme
from numpy.typing import NDArray

from server import TritonServer
from tests.client import misbehaving
from tests.client.wire import wire
from triton_sam3 import AsyncClient, Client, ServerError, ServerUnreachable
from triton_sam3.endpoint import Endpoint
from triton_sam3.flow import Call, Flow, Infer, Query
from triton_sam3.retry import Retries
from triton_sam3.steps import perform, perform_async
from triton_sam3.transports import open_async_transport, open_transport

Pixels = NDArray[np.uint8]
METADATA = Query("get_server_metadata")
HEADERS = {"Authorization": "Bearer token"}
QUICK = Retries(3, base=0.01)


def run(flow: Flow[Any], url: str) -> Any:
    transport = open_transport(Endpoint.parse(url), HEADERS)
    try:
        return perform(flow, transport)
    finally:
        transport.close()


def run_async(flow: Flow[Any], url: str) -> Any:
    async def main() -> Any:
        transport = open_async_transport(Endpoint.parse(url), HEADERS)
        try:
            return await perform_async(flow, transport)
        finally:
            await transport.close()

    return asyncio.run(main())


both = pytest.mark.parametrize("perform_flow", [run, run_async])
Run = Callable[[Flow[Any], str], Any]


@both
def test_requests_are_retried_over_http(perform_flow: Run) -> None:
    busy, down = (429, b'{"error": "busy"}'), (503, b"<html>")
    with misbehaving.http(busy, down, (200, misbehaving.METADATA)) as (url, counter):
        assert perform_flow(QUICK.send(METADATA), url)["name"] == "triton"
        assert counter.requests == 3


@pytest.mark.semantic("ways to call", "what is safe is sent again", "the contract")
@both
def test_requests_are_retried_over_grpc(perform_flow: Run) -> None:
    code = grpc.StatusCode
    answers = (code.RESOURCE_EXHAUSTED, "busy"), (code.UNAVAILABLE, "down"), (code.OK, "")
    with misbehaving.grpc_server(*answers) as (url, counter):
        assert perform_flow(QUICK.send(METADATA), url)["name"] == "triton"
        assert counter.requests == 3


@pytest.mark.semantic("ways to call", "a bad prompt is not sent again", "the contract")
@both
def test_an_invalid_request_is_sent_once(perform_flow: Run) -> None:
    with misbehaving.http((400, b'{"error": "no"}')) as (url, counter):
        with pytest.raises(Exception, match="no"):
            perform_flow(QUICK.send(METADATA), url)
        assert counter.requests == 1
    with misbehaving.grpc_server((grpc.StatusCode.INVALID_ARGUMENT, "no")) as (url, counter):
        with pytest.raises(Exception, match="no"):
            perform_flow(QUICK.send(METADATA), url)
        assert counter.requests == 1


@both
@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_the_number_of_retries_is_limited(perform_flow: Run, scheme: str) -> None:
    url = f"{scheme}://127.0.0.1:{misbehaving.unused_port()}"
    with pytest.raises(ServerUnreachable):
        perform_flow(QUICK.send(METADATA), url)


@both
@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_headers_of_a_request_may_be_written_in_any_case(perform_flow: Run, scheme: str) -> None:
    """As some propagators of traces write them; gRPC itself takes lower case alone."""
    headers = {"X-Amzn-Trace-Id": "Root=1", "Authorization": "b"}
    request = Infer("sam3_prompt_decoder", {}, (), headers)
    grpc_server = misbehaving.grpc_server((grpc.StatusCode.NOT_FOUND, "no such model"))
    http_server = misbehaving.http((404, b'{"error": "no such model"}'))
    with grpc_server if scheme == "grpc" else http_server as (url, counter):
        with pytest.raises(ServerError, match="no such model"):
            perform_flow(QUICK.send(request), url)
        (sent,) = counter.headers
        assert (sent["x-amzn-trace-id"], sent["authorization"]) == ("Root=1", "b")


def test_the_connection_to_a_vanished_host_is_closed() -> None:
    """Within 20 s and not the kernel's quarter of an hour, in which every call would time out."""
    with misbehaving.grpc_server((grpc.StatusCode.OK, "")) as (url, _):
        endpoint = Endpoint.parse(url)
        transport = open_transport(endpoint, {})
        transport.call(Call(METADATA, 9.0))
        port = int(endpoint.address.rpartition(":")[2])
        (ours,) = (
            connection.fd
            for connection in psutil.Process().net_connections("tcp")
            if connection.raddr and connection.raddr.port == port
        )
        with socket.socket(fileno=os.dup(ours)) as connected:
            assert connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 20_000
        transport.close()


@pytest.mark.semantic("ways to call", "headers go with every request", "the contract")
@both
@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_headers_go_with_every_request(perform_flow: Run, scheme: str) -> None:
    grpc_server = misbehaving.grpc_server((grpc.StatusCode.OK, ""))
    http_server = misbehaving.http((200, misbehaving.METADATA))
    with grpc_server if scheme == "grpc" else http_server as (url, counter):
        perform_flow(QUICK.send(METADATA), url)
        perform_flow(QUICK.send(Infer("sam3_prompt_decoder", {}, ())), url)
        assert [sent.get("authorization") for sent in counter.headers] == ["Bearer token"] * 2


def test_a_transport_is_reused_for_many_calls(url: str) -> None:
    with wire(url) as counted:
        transport = open_transport(Endpoint.parse(counted.url), {})
        try:
            for _ in range(5):
                assert transport.call(Call(METADATA, 20.0))["name"] == "triton"
        finally:
            transport.close()
        assert counted.connections == 1


@dataclass(frozen=True)
class Secured:
    """The real server behind something that ends TLS, and who signed its certificate."""

    url: str
    authority: Path
    client_key: Path
    client_chain: Path


@pytest.fixture
def secured(url: str, tmp_path: Path) -> Iterator[Secured]:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    context.set_alpn_protocols(["h2", "http/1.1"] if url.startswith("grpc") else ["http/1.1"])
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    mine = authority.issue_cert("client")
    files = Secured("", tmp_path / "ca.pem", tmp_path / "key.pem", tmp_path / "chain.pem")
    authority.cert_pem.write_to_path(files.authority)
    mine.private_key_pem.write_to_path(files.client_key)
    mine.cert_chain_pems[0].write_to_path(files.client_chain)
    with wire(url, context) as running:
        yield Secured(running.url, files.authority, files.client_key, files.client_chain)


@pytest.mark.semantic("ways to call", "TLS with certificates on both sides", "the contract")
def test_tls_with_a_private_authority_on_both_sides(
    secured: Secured, server: TritonServer, coins: Pixels
) -> None:
    files: dict[str, Any] = {
        "root_certificates": secured.authority,
        "private_key": secured.client_key,
        "certificate_chain": secured.client_chain,
    }
    with Client(server.grpc_url) as plain:
        expected = plain.segment(coins, points=[(110, 80)])
    with Client(secured.url, **files) as client:
        result = client.segment(coins, points=[(110, 80)])
    np.testing.assert_array_equal(result.logits, expected.logits)

    async def awaited() -> Any:
        async with AsyncClient(secured.url, **files) as client:
            return await client.segment(coins, points=[(110, 80)])

    np.testing.assert_array_equal(asyncio.run(awaited()).logits, expected.logits)


def test_the_systems_authorities_are_trusted(
    secured: Secured, coins: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(secured.authority))
    key, chain = secured.client_key, secured.client_chain
    with Client(secured.url, private_key=key, certificate_chain=chain) as client:
        assert len(client.segment(coins, points=[(110, 80)], threshold=-1)) == 1


def test_a_proxy_from_the_environment_is_not_used(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{misbehaving.unused_port()}")
    with Client(url, retries=0) as client:
        assert client.status().ready


def test_an_unknown_authority_is_not_trusted(
    secured: Secured, coins: Pixels, tmp_path: Path
) -> None:
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(other)
    for trusted in (None, other):
        unsure = pytest.raises(ServerUnreachable, match=r"(?i)certificate.*; set root_certificates")
        with Client(secured.url, retries=0, root_certificates=trusted) as client, unsure:
            client.segment(coins, points=[(110, 80)])


def test_another_hosts_certificate_is_not_trusted(secured: Secured, coins: Pixels) -> None:
    elsewhere = secured.url.replace("localhost", "127.0.0.1")
    says = r"(?i)(host|not valid).*; set root_certificates"
    unsure = pytest.raises(ServerUnreachable, match=says)
    with Client(elsewhere, retries=0, root_certificates=secured.authority) as client, unsure:
        client.segment(coins, points=[(110, 80)])


def test_a_client_without_a_certificate_is_rejected(secured: Secured, coins: Pixels) -> None:
    nameless = Client(secured.url, retries=0, root_certificates=secured.authority)
    with nameless as client, pytest.raises(ServerUnreachable):
        client.segment(coins, points=[(110, 80)])


@pytest.mark.parametrize("scheme", ["grpcs", "https"])
def test_missing_pem_files_are_named(scheme: str) -> None:
    with pytest.raises(ValueError, match=r"no PEM file 'nowhere\.pem'"):
        Client(f"{scheme}://localhost:1", root_certificates="nowhere.pem")


async def _status(url: str, **options: Any) -> None:
    async with AsyncClient(url, **options) as client:
        await client.status()


def ask(url: str, **options: Any) -> None:
    with Client(url, **options) as client:
        client.status()


def ask_async(url: str, **options: Any) -> None:
    asyncio.run(_status(url, **options))


@pytest.mark.parametrize("ask_once", [ask, ask_async])
@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_clients_headers_and_retries_apply_to_its_calls(
    ask_once: Callable[..., None], scheme: str
) -> None:
    server = {
        "grpc": misbehaving.grpc_server((grpc.StatusCode.UNAVAILABLE, "down")),
        "http": misbehaving.http((503, b"{}")),
    }[scheme]
    with server as (url, counter), pytest.raises(ServerUnreachable):
        ask_once(url, headers=HEADERS, retries=1)
    assert [sent["authorization"] for sent in counter.headers] == ["Bearer token"] * 2


@both
def test_an_answer_of_many_masks_fits_through_grpc(perform_flow: Run) -> None:
    """gRPC by itself takes 4 MiB: 25 masks of SAM 3's size."""
    large = "x" * (5 << 20)
    with misbehaving.grpc_server((grpc.StatusCode.OK, large)) as (url, _):
        assert perform_flow(QUICK.send(METADATA), url)["version"] == large


async def test_over_http_the_calls_deadline_is_the_only_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """tritonclient has one of its own, 60 s in all, less than a photo may take on a CPU."""
    loop = asyncio.get_running_loop()
    clock = loop.time
    with misbehaving.http((200, misbehaving.METADATA), delay=0.3) as (url, counter):
        transport = open_async_transport(Endpoint.parse(url), {})
        answer = asyncio.ensure_future(transport.call(Call(METADATA, 1000.0)))
        while not counter.requests:
            await asyncio.sleep(0.01)
        monkeypatch.setattr(loop, "time", lambda: clock() + 100)
        assert (await answer)["name"] == "triton"
        await transport.close()


def test_a_server_that_is_away_is_tried_again_and_again() -> None:
    """gRPC by itself would wait ever longer, up to two minutes: it would try twice or so here."""
    attempts = 0

    def hang_up() -> None:
        nonlocal attempts
        with suppress(OSError):
            while True:
                listener.accept()[0].close()
                attempts += 1

    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"grpc://127.0.0.1:{listener.getsockname()[1]}"
        transport = open_transport(Endpoint.parse(url), {})
        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        until = time.monotonic() + 4
        while time.monotonic() < until:
            time.sleep(0.02)
            with pytest.raises(ServerUnreachable):
                transport.call(Call(METADATA, 9.0))
        transport.close()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert attempts >= 6
