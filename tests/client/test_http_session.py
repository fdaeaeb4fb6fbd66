"""Over HTTP: no redirect is followed, nothing compressed is unpacked."""

import asyncio
import gzip
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.client import misbehaving
from triton_sam3 import ServerError, TransportError
from triton_sam3.contract import IMAGE, INTERACTIVE
from triton_sam3.endpoint import Endpoint
from triton_sam3.flow import Call, Infer, Query
from triton_sam3.http_session import Compressed, _refuse_compression
from triton_sam3.transports import open_async_transport, open_transport

METADATA = Query("get_server_metadata")
IMAGE_SENT = Infer(INTERACTIVE, {IMAGE.name: np.zeros((1, 8, 8, 3), np.uint8)}, ("scores",))
HEADERS = {"x-api-key": "secret"}


def call(url: str, request: Query | Infer) -> Any:
    transport = open_transport(Endpoint.parse(url), HEADERS)
    try:
        return transport.call(Call(request, 20.0))
    finally:
        transport.close()


def call_async(url: str, request: Query | Infer) -> Any:
    async def run() -> Any:
        transport = open_async_transport(Endpoint.parse(url), HEADERS)
        try:
            return await transport.call(Call(request, 20.0))
        finally:
            await transport.close()

    return asyncio.run(run())


Send = Callable[[str, Query | Infer], Any]
both = pytest.mark.parametrize("send", [call, call_async])


@both
@pytest.mark.parametrize("request_", [METADATA, IMAGE_SENT])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_neither_headers_nor_images_follow_a_redirect(
    send: Send, request_: Query | Infer, status: int
) -> None:
    with misbehaving.http((200, misbehaving.METADATA)) as (other, counter):
        location = f"{other.replace('//', '//me:secret@')}/login?token=secret#secret"
        with misbehaving.http((status, b""), headers={"Location": location}) as (url, _):
            expected_error = pytest.raises(
                TransportError, match=rf"^{url} redirects to {other}/login, but"
            )
            with expected_error as caught:
                send(url, request_)
        assert counter.requests == 0
    assert "secret" not in str(caught.value)


def test_a_relative_redirect_is_named_in_full() -> None:
    expected_error = pytest.raises(
        TransportError, match=r"redirects to http://127\.0\.0\.1:\d+/login,"
    )
    with misbehaving.http((302, b""), headers={"Location": "/login"}) as (url, _), expected_error:
        call(url, METADATA)


@both
@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br"])
@pytest.mark.parametrize("request_", [METADATA, IMAGE_SENT])
def test_compressed_answers_are_rejected_without_unpacking(
    send: Send, encoding: str, request_: Query | Infer
) -> None:
    packed = gzip.compress(bytes(1 << 24))
    with misbehaving.http((200, packed), headers={"Content-Encoding": encoding}) as (url, counter):
        with pytest.raises(ServerError, match=f"Content-Encoding '{encoding}'.*turn compression"):
            send(url, request_)
        assert counter.headers[0]["accept-encoding"] == "identity"


def test_the_encoding_identity_is_accepted() -> None:
    answer = (200, misbehaving.METADATA)
    with misbehaving.http(answer, headers={"Content-Encoding": "identity"}) as (url, _):
        assert call(url, METADATA)["name"] == "triton"


def test_a_compressed_error_is_reported_by_its_status() -> None:
    answer = (503, gzip.compress(b"<html>"))
    expected_error = pytest.raises(TransportError, match="HTTP status 503")
    with misbehaving.http(answer, headers={"Content-Encoding": "gzip"}) as (url, _), expected_error:
        call(url, METADATA)


async def test_a_connection_whose_answer_is_refused_is_given_up() -> None:
    """Whatever the version of aiohttp: some keep it, and there are only so many."""

    class Answer:
        status, headers, closed = 200, {"Content-Encoding": "gzip"}, False

        def close(self) -> None:
            self.closed = True

    answer: Any = Answer()
    with pytest.raises(Compressed):
        await _refuse_compression(answer)
    assert answer.closed
