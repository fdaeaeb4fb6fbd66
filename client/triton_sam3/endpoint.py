"""Where the server is: the URL's scheme picks the protocol and TLS."""

import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

DEFAULT_URL = "grpc://127.0.0.1:8001"
_DEFAULT_PORTS = {"grpc": 8001, "http": 8000, "grpcs": 443, "https": 443}
"""Triton's own ports, and the usual one where a proxy ends TLS."""
_PLAIN = ("grpc", "http")


@dataclass(frozen=True)
class TLS:
    """PEM files: the authorities to trust (default: the system's), and this client's identity.

    ValueError names a file that is not there.
    """

    root_certificates: str | Path | None = None
    private_key: str | Path | None = None
    certificate_chain: str | Path | None = None

    def __post_init__(self) -> None:
        for path in (self.root_certificates, self.private_key, self.certificate_chain):
            if path is not None and not Path(path).is_file():
                raise ValueError(f"there is no PEM file {str(path)!r}")

    def context(self) -> ssl.SSLContext:
        """The same as an SSL context, for HTTP."""
        context = ssl.create_default_context(cafile=self.root_certificates)
        if self.certificate_chain is not None:
            context.load_cert_chain(self.certificate_chain, self.private_key)
        return context


@dataclass(frozen=True)
class Endpoint:
    """A parsed URL. `address` is what tritonclient wants: host:port, for HTTP with the path."""

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
        """Read a URL; ValueError says what is accepted."""
        parts = urlsplit(url)
        try:
            default = _DEFAULT_PORTS[parts.scheme]
            port = default if parts.port is None else parts.port
        except (KeyError, ValueError):
            raise _not_a_url(url) from None
        host, path = parts.hostname, parts.path.rstrip("/")
        if not host or not port or (path and parts.scheme.startswith("grpc")) or parts.query:
            raise _not_a_url(url)
        host = f"[{host}]" if ":" in host else host
        tls = tls or TLS()
        if parts.scheme in _PLAIN and tls != TLS():
            raise ValueError(
                f"{url!r} has no TLS, and PEM files are given: write {parts.scheme}s://"
            )
        return cls(parts.scheme, f"{host}:{port}{path}", None if parts.scheme in _PLAIN else tls)


def _not_a_url(url: str) -> ValueError:
    return ValueError(
        f"{url!r} is not a server's URL; give grpc://host:8001, http://host:8000[/path], or "
        "grpcs:// and https:// for TLS"
    )
