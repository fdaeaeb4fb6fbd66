"""Small real servers on loopback that do what a healthy Triton does not.

Each yields its URL: a port nobody listens on, one that accepts and says nothing, one that hangs up,
and HTTP and gRPC servers that answer with given errors before they answer well.
"""

import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc  # type: ignore[import-untyped]
from tritonclient.grpc import service_pb2, service_pb2_grpc

METADATA = b'{"name": "triton", "version": "1"}'


def unused_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def tcp(hang_up: bool) -> Iterator[int]:
    """A port that accepts connections, then hangs up at once or keeps silent; yields the port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        held: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                if hang_up:
                    connection.close()
                else:
                    held.append(connection)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in held:
                connection.close()


class Counter:
    """Answers given in turn, the last of them for good, and how many requests came."""

    def __init__(self, answers: Sequence[Any]) -> None:
        self._answers = list(answers)
        self.requests = 0
        self.headers: list[dict[str, str]] = []
        self._guard = threading.Lock()

    def next(self) -> Any:
        with self._guard:
            self.requests += 1
            return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


@contextmanager
def http(
    *answers: tuple[int, bytes], headers: Mapping[str, str] | None = None, delay: float = 0.0
) -> Iterator[tuple[str, Counter]]:
    """An HTTP server that gives these statuses and bodies in turn, each with `headers` and after
    `delay` seconds; yields URL and counter."""
    counter = Counter(answers)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, body = counter.next()
            time.sleep(delay)
            counter.headers.append({name.lower(): value for name, value in self.headers.items()})
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, *args: Any) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    # It looks that often whether it is to end.
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", counter
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def grpc_server(*answers: tuple[grpc.StatusCode, str]) -> Iterator[tuple[str, Counter]]:
    """A gRPC server that gives these codes in turn; yields its URL and a counter.

    The text is the error's, or where there is none the version that the server says it has.
    """
    counter = Counter(answers)

    def answer(context: Any) -> str:
        counter.headers.append(dict(context.invocation_metadata()))
        code, text = counter.next()
        if code is not grpc.StatusCode.OK:
            context.abort(code, text)
        return str(text)

    class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
        def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002 - Triton's
            version = answer(context) or "1"
            return service_pb2.ServerMetadataResponse(name="triton", version=version)

        def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002 - Triton's
            answer(context)
            return service_pb2.ModelInferResponse()

    server = grpc.server(ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"grpc://127.0.0.1:{port}", counter
    finally:
        server.stop(None).wait()
