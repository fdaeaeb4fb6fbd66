"""Turn whatever the protocol libraries raise into this package's own errors, in one place."""

import asyncio
import re

import aiohttp
from tritonclient.utils import InferenceServerException

from . import contract
from .errors import (
    AccessDenied,
    DeadlineExceeded,
    ImageNotKept,
    InvalidRequest,
    ModelUnavailable,
    Overloaded,
    SAM3Error,
    ServerError,
    ServerUnreachable,
    TransportError,
)
from .http_session import Compressed, Redirected


class RegionLost(ServerError):
    """The server does not know a shared memory region, probably because it was restarted."""


class RegionInUse(ServerError):
    """The server has not released the last request with tensors in a shared memory region.

    Triton 2.51 refuses to unregister such a region, even for a moment after it has answered.
    """


class RegionKnown(ServerError):
    """The server has already registered a shared memory region of this name."""


class Refused(Overloaded):
    """Not admitted: a proxy, or Triton's queue, has no room for another request."""


class ModelGone(ModelUnavailable):
    """The model was unloaded by a server that is shutting down: its gRPC outlives its models."""


_GRPC = "StatusCode."
_KINDS: dict[str, type[SAM3Error]] = {
    **dict.fromkeys(("401", "403", "407", "UNAUTHENTICATED", "PERMISSION_DENIED"), AccessDenied),
    "INVALID_ARGUMENT": InvalidRequest,
    "OUT_OF_RANGE": InvalidRequest,
    "400": InvalidRequest,
    "413": InvalidRequest,
    "422": InvalidRequest,
    "RESOURCE_EXHAUSTED": Overloaded,
    "429": Refused,
    "CANCELLED": ServerUnreachable,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "504": DeadlineExceeded,
    "UNAVAILABLE": ServerUnreachable,
    "502": ServerUnreachable,
    "503": ServerUnreachable,
}
_OWN_DEADLINE = "Deadline Exceeded"
"""gRPC's message for the deadline set here; limits set elsewhere have other messages."""

_NOT_JSON = "an exception occurred in the client while decoding the response"
"""Start of tritonclient's message for a page that a proxy sent."""

_WRAPPING = re.compile(r"^(?:\[request id: [^\]]*\] |in ensemble '[^']*', )+")
_NO_SHARED_MEMORY = re.compile(r"failed to increase the shared memory pool", re.I)
_UNTRUSTED = re.compile(r"certificate[ _]verify[ _]failed|hostname verification check", re.I)
"""OpenSSL's messages, and gRPC's for the certificate of another host."""

_PATTERNS: tuple[tuple[re.Pattern[str], type[SAM3Error]], ...] = (
    (re.compile(rf"(?:^|[:,] ){re.escape(contract.NOT_KEPT)}"), ImageNotKept),
    (re.compile("unable to find .*shared memory region", re.I), RegionLost),
    (re.compile("shared memory region .* currently in use", re.I), RegionInUse),
    (re.compile("shared memory region .* already in manager", re.I), RegionKnown),
    (re.compile("no available versions", re.I), ModelGone),
    (re.compile("is restricted, expecting header"), AccessDenied),
    (re.compile("unknown model|is not ready|not healthy", re.I), ModelUnavailable),
    (re.compile("exceeds maximum queue size|queue .*full|too many requests", re.I), Refused),
    (re.compile("header with status: 429"), Refused),  # gRPC's message for an HTTP status
    (re.compile("header with status: 504|upstream request timeout"), DeadlineExceeded),
    (_NO_SHARED_MEMORY, Overloaded),
)
"""Messages of Triton, proxies and gRPC. Triton's codes are coarse, so these take precedence."""

_REMEDIES: dict[str | type[object], str] = {
    AccessDenied: "; check the headers, such as authorization",
    "413": "; a proxy's limit on request bodies is lower than the image's size",
    Overloaded: "; the server is busy: try again later, or send less at a time",
    ModelUnavailable: "; check `triton-sam3 status` and the server's log",
}


def translate(error: Exception, url: str, waited: float) -> SAM3Error:
    """The error a caller sees for `error`, raised by a request to `url` after `waited` seconds."""
    if isinstance(error, InferenceServerException):
        return _from_server(error, url, waited)
    if isinstance(error, (asyncio.TimeoutError, TimeoutError)):
        return _deadline(url, waited)
    if isinstance(error, Redirected):
        return TransportError(
            f"{url} redirects to {error}, but redirects are not followed, because headers and "
            "images would go there too: if you trust that server, use its own URL"
        )
    if isinstance(error, Compressed):
        return ServerError(
            f"{url} answered with Content-Encoding {str(error)!r}, but compressed answers are not "
            "accepted, as they may unpack to any size: turn compression off in the proxy"
        )
    reason = f"{type(error).__name__}: {error}".removesuffix(": ")
    if isinstance(error, (OSError, aiohttp.ClientError)):
        return _unreachable(url, str(error) or reason)
    return ServerError(
        f"{url} does not respond like Triton ({reason}); does the port speak {_scheme(url)}?"
    )


def _from_server(error: InferenceServerException, url: str, waited: float) -> SAM3Error:
    status = str(error.status() or "").removeprefix(_GRPC)
    text = _WRAPPING.sub("", str(error.message() or "no reason given"))
    if text.startswith(_NOT_JSON):
        text = f"HTTP status {status}, from something that is not Triton"
    kind = _kind(status, text)
    if _NO_SHARED_MEMORY.search(text):  # Triton names the region, which means nothing to the caller
        text = "the server's /dev/shm is full; its operator can enlarge it (--shm-size)"
    if kind is DeadlineExceeded:
        return _deadline(url, waited, "" if text == _OWN_DEADLINE else text)
    if kind is ServerUnreachable:
        return _unreachable(url, text)
    if kind is AccessDenied:
        text = f"{url} rejects this client: {text}"
    if kind is ServerError or issubclass(kind, ModelUnavailable):
        text = f"{url} answered: {text}"
    if kind is ServerError and status == "404":
        text = f"{text}; check the path of the URL"
    found = (_REMEDIES[key] for key in (status, *kind.__mro__) if key in _REMEDIES)
    return kind(text + next(found, ""))


def _kind(status: str, text: str) -> type[SAM3Error]:
    """By the first pattern that matches the message, or else by the status code."""
    matched = (kind for pattern, kind in _PATTERNS if pattern.search(text))
    return next(matched, _KINDS.get(status, ServerError))


def _unreachable(url: str, reason: str) -> ServerUnreachable:
    remedy = f"is the server running there, and does the port speak {_scheme(url)}?"
    if _UNTRUSTED.search(reason):
        remedy = "set root_certificates or SSL_CERT_FILE to a PEM file of the authorities to trust"
    return ServerUnreachable(f"no answer from {url}: {reason}; {remedy}")


def _deadline(url: str, waited: float, said: str = "") -> DeadlineExceeded:
    if said:
        return DeadlineExceeded(
            f"{url} gave up after {waited:.3g} s: {said}; the limit is the server's or a proxy's, "
            "not this client's timeout"
        )
    return DeadlineExceeded(
        f"{url} did not answer within {waited:.3g} s; the server is slow or overloaded, or the "
        "client needs a longer timeout"
    )


def _scheme(url: str) -> str:
    return url.split(":", 1)[0]
