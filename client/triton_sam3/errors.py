"""Everything this package raises.

SAM3Error
├── PromptError (ValueError)                  a prompt is invalid; the request was not sent
├── ImageError (ValueError)                   an image cannot be read, or is not supported
├── ClientUnusable (RuntimeError)             closed, or used in another process or event loop
├── ServerError                               the server answered with an error
│   ├── InvalidRequest                        it rejected the request: correct it, do not retry
│   ├── AccessDenied                          it rejected the credentials, or their absence
│   ├── ImageNotKept                          the image id is unknown or evicted: send the image
│   ├── Overloaded                            it accepts no more work for now: retry later
│   └── ModelUnavailable                      the model is not loaded, or not ready
└── TransportError                            no answer came back
    ├── ServerUnreachable (ConnectionError)   nothing answers at the URL
    └── DeadlineExceeded (TimeoutError)       the answer took longer than the caller allowed

Catch ``SAM3Error`` for all of them, or the built-in exception given in brackets.
"""

from __future__ import annotations


class SAM3Error(Exception):
    """Base class of every error that this package raises deliberately."""


class PromptError(SAM3Error, ValueError):
    """A prompt is invalid; the request was not sent.

    The message quotes the value and says what is accepted.
    """


class ImageError(SAM3Error, ValueError):
    """An image cannot be read, or is of a kind that is not supported; nothing was sent."""


class ClientUnusable(SAM3Error, RuntimeError):
    """The client or view is closed, or belongs to another process or event loop; create another."""


class ServerError(SAM3Error):
    """The server answered with an error."""


class InvalidRequest(ServerError):
    """The server rejected the request as invalid; the same request would fail again.

    Unless the server now has a model of another size, which the client queries before its next
    request.
    """


class AccessDenied(ServerError):
    """The server, or a proxy, rejected the credentials or got none (HTTP 401, 403, 407)."""


class ImageNotKept(ServerError):
    """The server does not know the image id, or has evicted it; send the image again."""


class Overloaded(ServerError):
    """The server rejects work for now; the same request may succeed later."""


class ModelUnavailable(ServerError):
    """The model is not loaded on this server, or is not ready."""


class TransportError(SAM3Error):
    """No answer came back from the server."""


class ServerUnreachable(TransportError, ConnectionError):
    """Nothing answers at the URL; the message says which URL was tried and what to check."""


class DeadlineExceeded(TransportError, TimeoutError):
    """The answer took longer than the deadline; the server may still have done the work."""
