"""Every way a call can fail, as this package's own errors. The failures are real ones."""

import asyncio
import json
from collections.abc import Callable

import grpc  # type: ignore[import-untyped]
import pytest
from tritonclient.utils import InferenceServerException

from tests.client import misbehaving
from triton_sam3.endpoint import Endpoint
from triton_sam3.errors import (
    AccessDenied,
    DeadlineExceeded,
    ImageNotKept,
    InvalidRequest,
    ModelUnavailable,
    Overloaded,
    SAM3Error,
    ServerError,
    ServerUnreachable,
)
from triton_sam3.flow import Call, Query
from triton_sam3.translation import Refused, RegionInUse, RegionKnown, RegionLost, translate
from triton_sam3.transports import open_async_transport, open_transport

METADATA = Query("get_server_metadata")
URL = "grpc://127.0.0.1:1"


def call(url: str, timeout: float = 20.0) -> object:
    transport = open_transport(Endpoint.parse(url), {})
    try:
        return transport.call(Call(METADATA, timeout))
    finally:
        transport.close()


def call_async(url: str, timeout: float = 20.0) -> object:
    async def run() -> object:
        transport = open_async_transport(Endpoint.parse(url), {})
        try:
            return await transport.call(Call(METADATA, timeout))
        finally:
            await transport.close()

    return asyncio.run(run())


both = pytest.mark.parametrize("send", [call, call_async])
schemes = pytest.mark.parametrize("scheme", ["grpc", "http"])
Send = Callable[..., object]


@both
@schemes
def test_a_closed_port_is_server_unreachable(send: Send, scheme: str) -> None:
    url = f"{scheme}://127.0.0.1:{misbehaving.unused_port()}"
    with pytest.raises(ServerUnreachable, match="is the server running there") as caught:
        send(url)
    assert url in str(caught.value)


@both
@schemes
def test_an_unknown_host_is_server_unreachable(send: Send, scheme: str) -> None:
    with pytest.raises(ServerUnreachable, match=f"{scheme}://nowhere.invalid:80"):
        send(f"{scheme}://nowhere.invalid:80")


@both
@schemes
def test_a_closed_connection_is_server_unreachable(send: Send, scheme: str) -> None:
    with misbehaving.tcp(hang_up=True) as port, pytest.raises(ServerUnreachable):
        send(f"{scheme}://127.0.0.1:{port}")


@both
@schemes
def test_silence_ends_at_the_deadline(send: Send, scheme: str) -> None:
    with (
        misbehaving.tcp(hang_up=False) as port,
        pytest.raises(
            DeadlineExceeded, match=r"did not answer within 0\.[3-9]\d* s; the server is slow"
        ),
    ):
        send(f"{scheme}://127.0.0.1:{port}", 0.3)


@both
def test_the_other_protocol_on_the_port(send: Send) -> None:
    with (
        misbehaving.http((200, misbehaving.METADATA)) as (url, _),
        pytest.raises(ServerUnreachable, match="does the port speak grpc"),
    ):
        send(url.replace("http", "grpc"))
    with (
        misbehaving.grpc_server((grpc.StatusCode.OK, "")) as (url, _),
        pytest.raises(ServerUnreachable, match="does the port speak http"),
    ):
        send(url.replace("grpc", "http"))


@both
@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, InvalidRequest),
        (401, AccessDenied),
        (403, AccessDenied),
        (407, AccessDenied),
        (404, ServerError),
        (413, InvalidRequest),
        (422, InvalidRequest),
        (429, Refused),
        (500, ServerError),
        (502, ServerUnreachable),
        (503, ServerUnreachable),
        (504, DeadlineExceeded),
    ],
)
def test_http_statuses_become_errors(send: Send, status: int, error: type[SAM3Error]) -> None:
    with (
        misbehaving.http((status, json.dumps({"error": "because"}).encode())) as (url, _),
        pytest.raises(error) as caught,
    ):
        send(url)
    assert type(caught.value) is error


@both
def test_the_page_of_a_proxy_is_not_quoted(send: Send) -> None:
    with (
        misbehaving.http((502, b"<html><h1>502 Bad Gateway</h1></html>")) as (url, _),
        pytest.raises(ServerUnreachable, match="HTTP status 502") as caught,
    ):
        send(url)
    assert "<html>" not in str(caught.value)


@both
@pytest.mark.parametrize("body", [b"# HELP nv_inference_count", b"[]", b"null", b"\xff{}"])
def test_an_answer_that_triton_does_not_give_is_a_server_error(send: Send, body: bytes) -> None:
    expected_error = pytest.raises(ServerError, match=r"does not respond like Triton.* speak http")
    with misbehaving.http((200, body)) as (url, _), expected_error:
        send(url)


@both
def test_a_timeout_of_the_server_is_distinguished_from_the_clients(send: Send) -> None:
    expected_error = pytest.raises(
        DeadlineExceeded, match=r"gave up after .* not this client's timeout"
    )
    with misbehaving.http((504, b"<html>")) as (url, _), expected_error:
        send(url)
    for code, words in (
        (grpc.StatusCode.DEADLINE_EXCEEDED, "stream timeout"),
        (grpc.StatusCode.UNAVAILABLE, "upstream request timeout"),
        (grpc.StatusCode.UNAVAILABLE, "Received http2 header with status: 504"),
    ):
        with misbehaving.grpc_server((code, words)) as (url, _), expected_error:
            send(url)


def test_the_time_waited_includes_earlier_attempts() -> None:
    with misbehaving.tcp(hang_up=False) as port:
        transport = open_transport(Endpoint.parse(f"http://127.0.0.1:{port}"), {})
        with pytest.raises(DeadlineExceeded, match=r"within 7\.[1-9]\d* s"):
            transport.call(Call(METADATA, 0.1, spent=7.0))
        transport.close()


@both
@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequest),
        (grpc.StatusCode.OUT_OF_RANGE, InvalidRequest),
        (grpc.StatusCode.UNAUTHENTICATED, AccessDenied),
        (grpc.StatusCode.PERMISSION_DENIED, AccessDenied),
        (grpc.StatusCode.NOT_FOUND, ServerError),
        (grpc.StatusCode.INTERNAL, ServerError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Overloaded),
        (grpc.StatusCode.UNAVAILABLE, ServerUnreachable),
        (grpc.StatusCode.CANCELLED, ServerUnreachable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceeded),
    ],
)
def test_grpc_codes_become_errors(
    send: Send, code: grpc.StatusCode, error: type[SAM3Error]
) -> None:
    with misbehaving.grpc_server((code, "because")) as (url, _), pytest.raises(error) as caught:
        send(url)
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("status", "text", "error"),
    [
        ("StatusCode.NOT_FOUND", "image_id not found: send the image", ImageNotKept),
        ("404", "in ensemble 'sam3_interactive', image_id not found: …", ImageNotKept),
        ("StatusCode.INVALID_ARGUMENT", "image_id not found: send the image", ImageNotKept),
        ("StatusCode.NOT_FOUND", "Request for unknown model: 'x' is not found", ModelUnavailable),
        ("StatusCode.UNAVAILABLE", "Request for unknown model: 'x'", ModelUnavailable),
        ("500", "Stub process 'sam3_prompt_decoder_0' is not healthy.", ModelUnavailable),
        ("StatusCode.UNAVAILABLE", "Exceeds maximum queue size", Refused),
        ("503", "Exceeds maximum queue size", Refused),
        ("StatusCode.UNAVAILABLE", "Received http2 header with status: 429", Refused),
        ("404", "Unable to find shared memory region: 'x'", RegionLost),
        ("400", "Cannot unregister shared memory region 'x', it is currently in use.", RegionInUse),
        ("400", "shared memory region 'x' already in manager", RegionKnown),
        ("500", "Failed to increase the shared memory pool size for key 'x' to 9", Overloaded),
        (
            "StatusCode.UNAVAILABLE",
            "This protocol is restricted, expecting header 'triton-grpc-protocol-x'",
            AccessDenied,
        ),
        ("403", "This API is restricted, expecting header 'x'", AccessDenied),
    ],
)
def test_tritons_messages_take_precedence_over_its_codes(
    status: str, text: str, error: type[SAM3Error]
) -> None:
    raised = InferenceServerException(text, status=status)
    assert type(translate(raised, URL, 1.0)) is error


def test_the_servers_message_is_kept_without_its_prefix() -> None:
    text = "[request id: <id_unknown>] in ensemble 'sam3_interactive', box 3 is half a box"
    raised = InferenceServerException(text, status="400")
    assert str(translate(raised, URL, 1.0)) == "box 3 is half a box"


def test_a_full_dev_shm_is_named_instead_of_a_region() -> None:
    text = "Failed to increase the shared memory pool size for key 'triton_sam3_ab12' to 9 bytes."
    sentence = str(translate(InferenceServerException(text, status="500"), URL, 1.0))
    assert "/dev/shm is full" in sentence
    assert "send less at a time" in sentence
    assert "ab12" not in sentence


@both
@pytest.mark.parametrize(
    ("status", "says"),
    [
        (401, "rejects this client: because; check the headers"),
        (404, "answered: because; check the path of the URL"),
        (500, "answered: because"),
    ],
)
def test_messages_name_the_url(send: Send, status: int, says: str) -> None:
    with misbehaving.http((status, b'{"error": "because"}')) as (url, _):
        place = f"{url}/triton"
        with pytest.raises(ServerError, match=f"^{place} {says}"):
            send(place)


def test_an_unknown_model_is_reported_with_the_url() -> None:
    raised = InferenceServerException("Request for unknown model: 'x'", status="404")
    assert str(translate(raised, URL, 1.0)).startswith(f"{URL} answered: Request for unknown")


def test_rejected_credentials_point_to_the_headers() -> None:
    raised = InferenceServerException("no token", status="401")
    assert "check the headers, such as authorization" in str(translate(raised, URL, 1.0))
