"""Send octets and read an answer: one connection per HTTP request, one channel for gRPC."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Any

import grpc  # type: ignore[import-untyped]
from tritonclient.grpc import InferResult as GrpcResult
from tritonclient.grpc import service_pb2
from tritonclient.http import InferenceServerClient

from benchmarks.fuzz.messages import INFERENCE_HEADER

SECONDS = 30.0
"""A request that takes longer counts as hung."""

INFER = "/inference.GRPCInferenceService/ModelInfer"
CLOSED, HUNG, UNREACHABLE, UNREADABLE = "closed", "hung", "unreachable", "unreadable"


@dataclass(frozen=True)
class Answer:
    """What came back."""

    code: str
    """An HTTP status, the name of a gRPC status, or one of the words above."""
    text: str = ""
    """The error message of a refusal."""
    result: Any = None
    """tritonclient's InferResult of a successful inference."""


class Http:
    """Sends octets to the HTTP port; thread-safe."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)

    def send(self, octets: bytes) -> Answer:
        """Send everything, shut down the sending side, and read one answer."""
        try:
            connection = socket.create_connection(self._address, SECONDS)
        except OSError as error:
            return Answer(UNREACHABLE, str(error))
        with connection:
            try:
                self._write(connection, octets)
                return _read(connection)
            except TimeoutError:
                return Answer(HUNG)
            except (OSError, HTTPException) as error:
                return Answer(CLOSED, type(error).__name__)

    @staticmethod
    def _write(connection: socket.socket, octets: bytes) -> None:
        try:
            connection.sendall(octets)
            connection.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the server had read enough: its answer may have arrived


def _read(connection: socket.socket) -> Answer:
    response = HTTPResponse(connection)
    response.begin()
    body = response.read()
    code = str(response.status)
    if code != "200":
        return Answer(code, _error_of(body))
    try:
        return Answer(code, result=_http_result(body, response.getheader(INFERENCE_HEADER)))
    except Exception as error:  # whatever the client's parser raises, the answer is unreadable
        return Answer(UNREADABLE, f"{type(error).__name__}: {error}")


def _error_of(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")


def _http_result(body: bytes, header: str | None) -> Any:
    """None for an answer to something other than inference: mutated paths lead to those."""
    if header is None and (not body or "outputs" not in json.loads(body)):
        return None
    length = None if header is None else int(header)
    return InferenceServerClient.parse_response_body(body, header_length=length)


class Grpc:
    """Sends octets as the message of a gRPC call; thread-safe."""

    def __init__(self, host: str, port: int) -> None:
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self._channel = grpc.insecure_channel(f"{host}:{port}", options)

    def send(self, octets: bytes, method: str = INFER) -> Answer:
        """Call a method with octets that need not be a message."""
        try:
            call = self._channel.unary_unary(method)
            answer = call(octets, timeout=SECONDS)
        except grpc.RpcError as error:
            return _refusal(error)
        if method != INFER:
            return Answer("OK")  # not a ModelInferResponse
        try:
            message = service_pb2.ModelInferResponse.FromString(answer)
            return Answer("OK", result=GrpcResult(message))
        except Exception as error:
            return Answer(UNREADABLE, f"{type(error).__name__}: {error}")

    def close(self) -> None:
        self._channel.close()


def _refusal(error: Any) -> Answer:
    code, text = error.code().name, error.details() or ""
    if code == "DEADLINE_EXCEEDED":
        return Answer(HUNG, text)
    if code == "UNAVAILABLE" and "connect" in text.lower():
        return Answer(UNREACHABLE, text)
    return Answer(code, text)
