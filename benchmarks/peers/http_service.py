"""Meta's predictor behind HTTP, with one lock and an in-process cache: no Triton.

    python -m benchmarks.peers.http_service CHECKPOINT [DEVICE]     prints the port it listens on

POST /image (raw RGB, X-Height, X-Width) → an id; POST /click {"image", "x", "y"} → the best mask's
bits. The predictor has one state, so one request is served at a time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import ROOT
from benchmarks.peers import best

HOST = "127.0.0.1"


class Service:
    """One predictor, one lock, one unbounded cache."""

    def __init__(self, checkpoint: Path, device: str) -> None:
        from benchmarks.reference import timed_predictor  # noqa: PLC0415 - the caller needs no torch

        self._predictor = timed_predictor(checkpoint, device)
        self._lock = threading.Lock()
        self._cache: dict[str, tuple[Any, Any]] = {}

    def image(self, body: bytes, height: int, width: int) -> bytes:
        photo = np.frombuffer(body, np.uint8).reshape(height, width, 3)
        image_id = uuid.uuid4().hex
        with self._lock:
            self._predictor.set_image(photo.copy())
            self._cache[image_id] = (self._predictor._features, self._predictor._orig_hw)
        return image_id.encode()

    def click(self, image_id: str, x: float, y: float) -> bytes:
        with self._lock:
            self._predictor._features, self._predictor._orig_hw = self._cache[image_id]
            self._predictor._is_image_set = True
            masks, scores, _ = self._predictor.predict(np.array([[x, y]]), np.array([1]))
        return np.packbits(best(masks, scores)).tobytes()


class Server(ThreadingHTTPServer):
    request_queue_size = 128
    """Callers that may connect at once; Python's default of 5 would reject the others."""


class Handler(BaseHTTPRequestHandler):
    service: Service
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # header and body in one packet
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/image":
            height, width = int(self.headers["X-Height"]), int(self.headers["X-Width"])
            answer = self.service.image(body, height, width)
        else:
            asked = json.loads(body)
            answer = self.service.click(asked["image"], asked["x"], asked["y"])
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def running(checkpoint: Path, device: str = "cpu") -> Iterator[tuple[str, int]]:
    """Run the service in a separate process; yields host and port."""
    command = [sys.executable, "-m", __name__, str(checkpoint.resolve()), device]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.strip().isdigit():
            raise RuntimeError(f"the HTTP service did not start (status {process.wait()})")
        yield HOST, int(line)
    finally:
        process.terminate()
        process.wait()


def _exit_with_caller() -> None:
    sys.stdin.read()  # to its end, which comes even if the caller is killed
    os._exit(0)


def main(checkpoint: Path, device: str) -> None:
    Handler.service = Service(checkpoint, device)
    server = Server((HOST, 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=_exit_with_caller, daemon=True).start()
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(sys.argv[2:] or ["cpu"]))
