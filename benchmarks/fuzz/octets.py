"""Valid requests with their bytes flipped, cut, spliced, and framed as no client would."""

from __future__ import annotations

import gzip
import json
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from tritonclient.grpc import service_pb2

from benchmarks.fuzz.exchange import INFER
from benchmarks.fuzz.exclusions import overflows
from benchmarks.fuzz.messages import (
    INFERENCE_HEADER,
    Request,
    grpc_octets,
    http_body,
    http_message,
    http_octets,
    http_path,
)
from benchmarks.fuzz.subject import (
    CLICK,
    DECODER,
    ENSEMBLE,
    FILE,
    SIZE,
    Array,
    Subject,
    middle,
    request,
    strings,
)

Headers = dict[str, str | int]

NUMBERS = [0, 1, -1, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 2**65]
LENGTHS = [*map(str, NUMBERS), "", "x", "1e3", "0x10", "+5", " 5", "5 5", "5,5", "\t", "-0"]
METHODS = [
    "GET",
    "HEAD",
    "PUT",
    "DELETE",
    "OPTIONS",
    "TRACE",
    "CONNECT",
    "post",
    "FOO",
    "P OST",
    "",
]
CALLS = ["ServerLive", "ServerReady", "ModelReady", "ModelMetadata", "ModelConfig", "ModelInfer "]
CALLS += ["ModelStatistics", "modelinfer", "Nothing", "", "ModelInfer/x"]


@dataclass(frozen=True)
class Octets:
    """What to send."""

    kind: str
    data: bytes
    method: str = INFER
    """The gRPC method."""
    framed: bool = True
    """Whether the HTTP framing is sound; if not, the server may close the connection."""


@dataclass(frozen=True)
class Corpus:
    """Valid requests to start from, most of them cheap."""

    requests: tuple[Request, ...]

    @classmethod
    def from_subject(cls, subject: Subject) -> Corpus:
        known: dict[str, Array] = {"image_id": strings(subject.image_id)}
        size: dict[str, Array] = {"image_size": np.array([SIZE], np.int32)}
        click = request(DECODER, {**known, **middle(), "best_only": np.array([[True]])})
        points = middle()["point_coords"] * np.array(SIZE, np.float32)
        labels = middle()["point_labels"]
        files = {"encoded_image": strings(subject.files[0])}
        file = request(FILE, {**files, "points": points, "point_labels": labels})
        finished = request(CLICK, {**known, **size, **middle()})
        whole = request(ENSEMBLE, {"image": subject.image, **middle()})
        return cls((click,) * 8 + (finished,) * 5 + (file,) * 2 + (whole,))


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Flip, replace, remove, repeat or move a few octets."""
    octets = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        if not octets:
            break
        place, length = rng.randrange(len(octets)), rng.randint(1, 16)
        action = rng.randrange(5)
        if action == 0:
            octets[place] ^= 1 << rng.randrange(8)
        elif action == 1:
            octets[place : place + 1] = rng.randbytes(1)
        elif action == 2:
            del octets[place : place + length]
        elif action == 3:
            octets[place:place] = octets[place : place + length]
        else:
            start = rng.randrange(len(octets))
            octets[place : place + length] = octets[start : start + length]
    return bytes(octets)


def over_http(corpus: Corpus, rng: random.Random) -> Octets:
    """One mutation of HTTP octets."""
    chosen = rng.choice(corpus.requests)
    kind = rng.choice(list(HTTP))
    made = HTTP[kind](chosen, rng)
    return Octets(kind, made, framed=kind in SOUND)


def _message(valid: Request, header: bytes, data: bytes) -> bytes:
    lengths: Headers = {"Content-Length": len(header) + len(data), INFERENCE_HEADER: len(header)}
    return http_message(http_path(valid), header + data, lengths)


def _json_flipped(valid: Request, rng: random.Random) -> bytes:
    header, data = http_body(valid)
    return _message(valid, mutated(header, rng), data)


def _json_numbers(valid: Request, rng: random.Random) -> bytes:
    header, data = http_body(valid)
    places = list(re.finditer(rb"\d+", header))
    place = rng.choice(places)
    number = str(rng.choice(NUMBERS)).encode()
    changed = header[: place.start()] + number + header[place.end() :]
    if lethal_json(changed):
        changed = header
    return _message(valid, changed, data)


def _json_values(valid: Request, rng: random.Random) -> bytes:
    header, data = http_body(valid)
    values = [b"null", b"[]", b"{}", b'""', b"true", b"-1", b"1e999", b'"\\u0000"', b'"\\ud800"']
    place = rng.choice(list(re.finditer(rb'"[^"]*"|\d+|\[[^\[\]]*\]', header)))
    return _message(
        valid, header[: place.start()] + rng.choice(values) + header[place.end() :], data
    )


def _data_flipped(valid: Request, rng: random.Random) -> bytes:
    header, data = http_body(valid)
    return _message(valid, header, mutated(data, rng))


def _header_length(valid: Request, rng: random.Random) -> bytes:
    header, data = http_body(valid)
    near = [str(len(header) + rng.randint(-3, 3)), str(len(header) + len(data) + rng.randint(0, 1))]
    length = rng.choice([*LENGTHS, *near])
    lengths: Headers = {"Content-Length": len(header) + len(data), INFERENCE_HEADER: length}
    return http_message(http_path(valid), header + data, lengths)


def _content_length(valid: Request, rng: random.Random) -> bytes:
    header, data = http_body(valid)
    near = [str(len(header) + len(data) + rng.randint(-9, 9)) for _ in range(6)]
    lengths: Headers = {
        "Content-Length": rng.choice([*LENGTHS, *near]),
        INFERENCE_HEADER: len(header),
    }
    if rng.random() < 0.1:
        del lengths["Content-Length"]
    return http_message(http_path(valid), header + data, lengths)


def _chunked(valid: Request, rng: random.Random) -> bytes:
    header, data = http_body(valid)
    body, chunks = header + data, []
    step = max(1, len(body) // rng.randint(1, 40))
    for start in range(0, len(body), step):
        piece = body[start : start + step]
        length = b"%x" % len(piece)
        if rng.random() < 0.03:
            odd = [b"0", b"-1", b"zz", b"ffffffffffffffff", b"", length + b";x=y", b" " + length]
            length = rng.choice(odd)
        chunks.append(length + b"\r\n" + piece + b"\r\n")
    ends = [b"0\r\n\r\n", b"0\r\n\r\n", b"", b"0\r\nX: y\r\n\r\n", b"0"]
    headers: Headers = {INFERENCE_HEADER: len(header), "Transfer-Encoding": "chunked"}
    if rng.random() < 0.2:
        headers["Content-Length"] = rng.choice(LENGTHS)
    return http_message(http_path(valid), b"".join(chunks) + rng.choice(ends), headers)


def _compressed(valid: Request, rng: random.Random) -> bytes:
    header, data = http_body(valid)
    coding, body = rng.choice(
        [("gzip", gzip.compress(header + data, 1)), ("deflate", zlib.compress(header + data, 1))]
    )
    if rng.random() < 0.7:
        body = mutated(body, rng)
    coding = rng.choice([coding, coding, coding, "gzip", "deflate", "br", "gzip, gzip", ""])
    lengths: Headers = {
        "Content-Length": len(body),
        INFERENCE_HEADER: len(header),
        "Content-Encoding": coding,
    }
    return http_message(http_path(valid), body, lengths)


def _request_line(valid: Request, rng: random.Random) -> bytes:
    line, _, rest = http_octets(valid).partition(b"\r\n")
    method, path, version = line.split(b" ")
    change = rng.randrange(4)
    if change == 0:
        method = rng.choice(METHODS).encode()
    elif change == 1:
        path = mutated(path, rng).replace(b"\n", b"")
    elif change == 2:
        path = rng.choice(
            [b"/", b"*", b"/v2", b"//v2", path + b"?x=%00", path * 40, b"/v2/models//infer"]
        )
    else:
        version = rng.choice([b"HTTP/1.0", b"HTTP/9.9", b"HTTP/2", b"", b"http/1.1", b"\xff"])
    return b" ".join((method, path, version)) + b"\r\n" + rest


def _header_lines(valid: Request, rng: random.Random) -> bytes:
    header, data = http_body(valid)
    odd: list[tuple[str, str | int]] = [
        ("X", "y" * rng.choice([10, 1000, 70_000])),
        ("X y", "z"),
        ("", ""),
        ("Host", "\x01\x02"),
        ("Expect", "100-continue"),
        ("Content-Type", "\xff\xfe"),
        ("Connection", "Upgrade"),
        ("Upgrade", "h2c"),
        ("content-length", len(header) + len(data) + rng.randint(0, 3)),
        ("Transfer-Encoding", "identity"),
        ("traceparent", "00-" + "f" * 32),
    ]
    lengths: Headers = {"Content-Length": len(header) + len(data), INFERENCE_HEADER: len(header)}
    return http_message(http_path(valid), header + data, {**lengths, **dict(rng.sample(odd, 2))})


def _cut(valid: Request, rng: random.Random) -> bytes:
    octets = http_octets(valid)
    return octets[: rng.randrange(len(octets))]


def _flipped(valid: Request, rng: random.Random) -> bytes:
    return mutated(http_octets(valid), rng)


def _noise(_: Request, rng: random.Random) -> bytes:
    return rng.randbytes(rng.randint(0, 600))


HTTP: dict[str, Callable[[Request, random.Random], bytes]] = {
    "JSON: octets changed": _json_flipped,
    "JSON: numbers changed": _json_numbers,
    "JSON: values changed": _json_values,
    "binary data changed": _data_flipped,
    "Inference-Header-Content-Length": _header_length,
    "Content-Length": _content_length,
    "chunks": _chunked,
    "compressed body": _compressed,
    "request line": _request_line,
    "header lines": _header_lines,
    "cut short": _cut,
    "octets changed anywhere": _flipped,
    "noise": _noise,
}
SOUND = {"JSON: octets changed", "JSON: numbers changed", "JSON: values changed"}
SOUND |= {"binary data changed", "compressed body"}


def over_grpc(corpus: Corpus, rng: random.Random) -> Octets:
    """One mutation of a gRPC message, or of the method it is sent to."""
    data = grpc_octets(rng.choice(corpus.requests))
    other = grpc_octets(rng.choice(corpus.requests))
    kind = rng.choice(GRPC)
    if kind == "method":
        return Octets(kind, data, INFER.rpartition("/")[0] + "/" + rng.choice(CALLS))
    start, end = sorted(rng.randrange(len(data)) for _ in range(2))
    changed = {
        "octets changed": lambda: mutated(data, rng),
        "start changed": lambda: mutated(data[:200], rng) + data[200:],
        "a number changed": lambda: (
            data[:start] + varint(rng.choice(NUMBERS[3:])) + data[start + 1 :]
        ),
        "cut short": lambda: data[:start],
        "two messages in one": lambda: data + other,
        "spliced": lambda: data[:end] + other[start:],
        "noise": lambda: rng.randbytes(rng.randint(0, 600)),
    }[kind]()
    return Octets(kind, data if lethal_message(changed) else changed)


GRPC = ["octets changed", "start changed", "a number changed", "cut short", "two messages in one"]
GRPC += ["spliced", "noise", "method"]


def varint(number: int) -> bytes:
    """Encode a number as a protobuf varint of at most ten octets."""
    octets = bytearray()
    number &= 2**70 - 1
    while number > 0x7F:
        octets.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*octets, number])


def lethal_json(header: bytes) -> bool:
    """Whether a JSON header is among the `exclusions`."""
    try:
        shapes = [tensor["shape"] for tensor in json.loads(header)["inputs"]]
        return any(overflows(shape) for shape in shapes)
    except (ValueError, KeyError, TypeError):
        return False


def lethal_message(data: bytes) -> bool:
    """Whether a gRPC message is among the `exclusions`."""
    try:
        message = service_pb2.ModelInferRequest.FromString(data)
    except DecodeError:
        return False
    return any(overflows(tensor.shape) for tensor in message.inputs)
