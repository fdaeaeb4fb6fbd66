"""Where the server is, and the TLS files and headers for requests to it.

The URL's scheme selects the protocol and TLS; PEM files and headers are validated before anything
is sent, because the protocol libraries abort the process on some of them.
"""

import os
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

DEFAULT_URL = "grpc://127.0.0.1:8001"
_DEFAULT_PORTS = {"grpc": 8001, "http": 8000, "grpcs": 443, "https": 443}
"""Triton's own ports, and the usual one of a proxy that terminates TLS."""
_PLAIN = ("grpc", "http")

_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt")
"""Where Debian and Fedora, and systems based on them, keep the certificate authorities."""

_HEADER_NAME = re.compile(r"(?!grpc-)[a-z0-9_.-]+(?<!-bin)", re.IGNORECASE)
_HEADER_VALUE = re.compile(r"[\x20-\x7e]*")
"""What both protocols accept: gRPC reserves names that begin with grpc- or end in -bin."""

_OWN_HEADERS = {
    *("accept-encoding", "content-encoding", "content-length", "content-type"),
    *("connection", "expect", "host", "keep-alive", "te", "trailer", "transfer-encoding"),
    *("inference-header-content-length", "proxy-connection", "upgrade"),
}
"""How a request is sent, which only the client knows: with other values, servers misread it or wait
for ever."""


@dataclass(frozen=True)
class TLS:
    """PEM files: the authorities to trust (default: the system's), and this client's identity.

    Raises ValueError for a file that is missing or cannot be used.
    """

    root_certificates: str | Path | None = None
    private_key: str | Path | None = None
    certificate_chain: str | Path | None = None

    def __post_init__(self) -> None:
        files = (self.root_certificates, self.private_key, self.certificate_chain)
        given = [path for path in files if path is not None]
        for path in given:
            if not Path(path).is_file():
                raise ValueError(f"there is no PEM file {str(path)!r}")
        if (self.private_key is None) is not (self.certificate_chain is None):
            raise ValueError(
                "private_key and certificate_chain together identify this client: pass both or "
                "neither"
            )
        if given:
            self._check(", ".join(repr(str(path)) for path in given))

    def _check(self, names: str) -> None:
        try:
            self.context()
        except OSError as error:  # an SSLError is one
            raise ValueError(
                f"these PEM files cannot be used ({names}): {error}; a private key must be "
                "unencrypted and match its certificate"
            ) from error

    @property
    def authorities(self) -> str | Path | None:
        """The file of the authorities to trust; None if the system has no single file of them."""
        return self.root_certificates or _system_authorities()

    def context(self) -> ssl.SSLContext:
        """The same as an SSL context, for HTTP."""
        context = ssl.create_default_context(cafile=self.root_certificates)
        if self.certificate_chain is not None:
            # Without a password, OpenSSL would prompt for one on the terminal.
            context.load_cert_chain(self.certificate_chain, self.private_key, password="")
        return context


def _system_authorities() -> str | None:
    """The authorities that HTTPS trusts, as the single file that gRPC needs.

    OpenSSL may know only a folder of them, as on Ubuntu; a file beside it has the same ones.
    """
    paths = ssl.get_default_verify_paths()
    if paths.cafile or {"SSL_CERT_FILE", "SSL_CERT_DIR"} & os.environ.keys():
        return paths.cafile
    return next((bundle for bundle in _BUNDLES if Path(bundle).is_file()), None)


@dataclass(frozen=True)
class Endpoint:
    """A parsed URL. `address` has tritonclient's form: host:port, for HTTP with the path."""

    scheme: str
    address: str
    tls: TLS | None = None

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.address}"

    @property
    def is_grpc(self) -> bool:
        return self.scheme.startswith("grpc")

    @classmethod
    def parse(cls, url: str, tls: TLS | None = None) -> "Endpoint":
        """Parse a URL; ValueError says what is accepted."""
        if not isinstance(url, str):
            raise _not_a_url(url)
        reject_secrets(url)
        try:
            parts = urlsplit(url)
            default = _DEFAULT_PORTS[parts.scheme]
            port = default if parts.port is None else parts.port
            (parts.hostname or "").encode("idna")
        except (KeyError, ValueError):  # a UnicodeError is one
            raise _not_a_url(url) from None
        host, path = parts.hostname, parts.path.rstrip("/")
        if not host or not port or (path and parts.scheme.startswith("grpc")):
            raise _not_a_url(url)
        host = f"[{host}]" if ":" in host else host
        tls = tls or TLS()
        if parts.scheme in _PLAIN and tls != TLS():
            raise ValueError(
                f"{url!r} does not use TLS, but PEM files were passed: use {parts.scheme}s://"
            )
        return cls(parts.scheme, f"{host}:{port}{path}", None if parts.scheme in _PLAIN else tls)


def reject_secrets(url: str) -> None:
    """Raise ValueError for a URL with a user name, a query or a fragment, without quoting it."""
    for mark, part in (("@", "user name or a password"), ("?", "query"), ("#", "fragment")):
        if mark in url:
            raise ValueError(
                f"a server URL must not contain a {part}, but this one, not shown as it may be "
                f"confidential, has {mark!r}: pass credentials in headers={{'authorization': …}}"
            )


def _not_a_url(url: object) -> ValueError:
    return ValueError(
        f"{url!r} is not a server URL; use grpc://host:8001, http://host:8000[/path], or "
        "grpcs:// and https:// for TLS"
    )


def validate_headers(headers: Mapping[str, str] | None) -> dict[str, str]:
    """Return the headers; raise ValueError for the first that the protocols do not both accept.

    The message quotes neither a value, which is likely a secret, nor an invalid name, which may be
    half of one.
    """
    for index, (name, value) in enumerate((headers or {}).items(), 1):
        if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
            raise ValueError(
                f"the name of header {index} is not valid: use letters, digits, '-', '_' and '.', "
                "without grpc- at the beginning or -bin at the end"
            )
        if name.lower() in _OWN_HEADERS:
            raise ValueError(
                f"header {name!r} says how a request is sent, so the client sets it itself: "
                "remove it from headers"
            )
        if not isinstance(value, str) or not _HEADER_VALUE.fullmatch(value):
            raise ValueError(
                f"the value of header {name!r} must be a single-line str of printable ASCII; "
                "strip() a value read from a file"
            )
    return dict(headers or {})
