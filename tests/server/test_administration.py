"""Nobody loads models, or sets where logs and traces are written: not by any bytes over a socket,
not even with what the server's command line shows to every user of the machine."""

import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial

import psutil
import pytest
import tritonclient.grpc
import tritonclient.http

from server import TritonServer
from tests.server import tiny

SOON = 5.0
HEADERS, END_HEADERS, DATA, END_STREAM = 1, 4, 0, 1
"""Types and flags of HTTP/2 frames (RFC 9113)."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("models")
    tiny.add_plus_one(folder)
    server = TritonServer(folder)
    try:
        yield server.start()
    finally:
        server.kill()


def header_of(server: TritonServer) -> tuple[str, str]:
    """The header that restricted requests are asked for, as any user of the machine can read it."""
    arguments = psutil.Process(server.pid).cmdline()
    (option,) = (arg for arg in arguments if arg.startswith("--http-restricted-api"))
    name, value = option.split(":", 1)[1].split("=")
    return name, value


def over_http(server: TritonServer, path: str, header: str) -> bytes:
    """The answer to a POST with that header."""
    address = (server.address.host, server.address.http_port)
    with socket.create_connection(address, SOON) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n{header}\r\n\r\n"
        connection.sendall(head.encode() + b"{}")
        return connection.recv(64)


def over_grpc(server: TritonServer, method: str, headers: Mapping[str, str]) -> bytes:
    """The answer to an empty message, with headers that no gRPC client would send."""
    address = (server.address.host, server.address.grpc_port)
    named = {
        ":method": "POST",
        ":scheme": "http",
        ":authority": "x",
        "te": "trailers",
        ":path": f"/inference.GRPCInferenceService/{method}",
        "content-type": "application/grpc",
        **headers,
    }
    block = b"".join(b"\0" + _text(name) + _text(value) for name, value in named.items())
    with socket.create_connection(address, SOON) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, b""))
        connection.sendall(_frame(HEADERS, END_HEADERS, 1, block))
        connection.sendall(_frame(DATA, END_STREAM, 1, bytes(5)))
        answer = b""
        with suppress(TimeoutError):
            while b"grpc-status" not in answer and (more := connection.recv(4096)):
                answer += more
        return answer


def _frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    return struct.pack(">I", len(body))[1:] + struct.pack(">BBI", kind, flags, stream) + body


def _text(text: str) -> bytes:
    """A string of HPACK (RFC 7541, 5.2) that is not compressed."""
    encoded = text.encode()
    assert len(encoded) < 127
    return bytes([len(encoded)]) + encoded


@pytest.mark.parametrize(
    "path",
    [
        "/v2/repository/index",
        "/v2/repository/models/plus_one/load",
        "/v2/repository/models/plus_one/unload",
        "/v2/trace/setting",
        "/v2/models/plus_one/trace/setting",
        "/v2/logging",
    ],
)
def test_nobody_administers_a_server_over_http(shared: TritonServer, path: str) -> None:
    name, key = (part.strip() for part in header_of(shared))
    assert over_http(shared, path, f"{name}: {key}").startswith(b"HTTP/1.1 403 ")
    breaks = ("\n", "\n ", "\n\t", "\r\n ", "\r", "%0a", "\\n")
    for header in (
        *(f"{name}: {key}{ending}" for ending in breaks),
        *(f"{name}{ending}: {key}" for ending in breaks),
        *(f"{name}{ending}: {key}{ending}" for ending in breaks),
    ):
        assert b" 200 " not in over_http(shared, path, header), repr(header)


def test_nobody_administers_a_server_over_grpc(shared: TritonServer) -> None:
    name, key = (part.strip() for part in header_of(shared))
    with tritonclient.grpc.InferenceServerClient(shared.grpc_url.split("://")[1]) as client:
        for headers in ({}, {f"triton-grpc-protocol-{name}": key}):
            for call in (
                client.get_model_repository_index,
                partial(client.unload_model, "plus_one"),
                partial(client.update_trace_settings, settings={"trace_file": "/tmp/x"}),
                partial(client.update_log_settings, {"log_file": "/tmp/x"}),
            ):
                with pytest.raises(tritonclient.utils.InferenceServerException, match="restricted"):
                    call(headers=headers)


@pytest.mark.parametrize("method", ["RepositoryIndex", "LogSettings", "TraceSetting"])
def test_no_bytes_over_grpc_carry_the_header(shared: TritonServer, method: str) -> None:
    name, key = (f"triton-grpc-protocol-{header_of(shared)[0]}", header_of(shared)[1])
    assert b"grpc-status\x010" in over_grpc(shared, "ServerLive", {})
    for headers in ({name: key}, {name.strip(): key}, {name.strip(): key.strip()}):
        answer = over_grpc(shared, method, headers)
        assert b"grpc-status" in answer
        assert b"grpc-status\x010" not in answer, headers
