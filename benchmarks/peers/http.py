"""The caller of `http_service`, with one persistent connection per thread."""

from __future__ import annotations

import http.client
import json
import threading

import numpy as np

from benchmarks.peers import Click, Mask, Photo


class OverHttp:
    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._local = threading.local()
        self._connections: list[http.client.HTTPConnection] = []

    def open(self, photo: Photo) -> Click:
        height, width = photo.shape[:2]
        shape = {"X-Height": str(height), "X-Width": str(width)}
        image_id = self._post("/image", photo.tobytes(), shape).decode()

        def click(x: float, y: float) -> Mask:
            body = json.dumps({"image": image_id, "x": x, "y": y}).encode()
            bits = np.frombuffer(self._post("/click", body, {}), np.uint8)
            return np.unpackbits(bits, count=width * height).reshape(height, width).astype(np.bool_)

        return click

    def close(self) -> None:
        for connection in self._connections:
            connection.close()

    def _post(self, path: str, body: bytes, headers: dict[str, str]) -> bytes:
        connection = self._connection()
        connection.request("POST", path, body, headers)
        response = connection.getresponse()
        answer = response.read()
        if response.status != http.client.OK:
            raise RuntimeError(f"POST {path}: {response.status} {answer[:200]!r}")
        return answer

    def _connection(self) -> http.client.HTTPConnection:
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = http.client.HTTPConnection(*self._address, timeout=600)
            self._local.connection = connection
            self._connections.append(connection)
        return connection
