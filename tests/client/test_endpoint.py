"""URLs: the scheme picks protocol and TLS."""

from pathlib import Path

import pytest

from triton_sam3.endpoint import DEFAULT_URL, TLS, Endpoint


@pytest.mark.parametrize(
    ("url", "address", "is_grpc", "secure"),
    [
        ("grpc://host:9", "host:9", True, False),
        ("grpcs://host:9", "host:9", True, True),
        ("http://host:9", "host:9", False, False),
        ("https://host:9", "host:9", False, True),
        ("grpc://host", "host:8001", True, False),
        ("http://host", "host:8000", False, False),
        ("grpcs://host", "host:443", True, True),
        ("https://host", "host:443", False, True),
        ("HTTP://Host:9/", "host:9", False, False),
        ("https://host/triton/", "host:443/triton", False, True),
        ("grpc://[::1]:9", "[::1]:9", True, False),
        (DEFAULT_URL, "127.0.0.1:8001", True, False),
    ],
)
def test_url(url: str, address: str, is_grpc: bool, secure: bool) -> None:
    endpoint = Endpoint.parse(url)
    assert endpoint.address == address
    assert endpoint.is_grpc is is_grpc
    assert (endpoint.tls is not None) is secure


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host",
        "host:8001",
        "localhost:8001",
        "ftp://host",
        "grpc://",
        "grpc://:8001",
        "grpc://host:port",
        "grpc://host:99999",
        "grpc://host:1/path",
        "http://host?query",
        "http://host:0",
    ],
)
def test_what_is_no_url_is_quoted_with_what_is_accepted(url: str) -> None:
    with pytest.raises(ValueError, match=r"is not a server's URL; give grpc://") as caught:
        Endpoint.parse(url)
    assert repr(url) in str(caught.value)


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_pem_files_without_tls_are_a_mistake(scheme: str) -> None:
    tls = TLS(root_certificates=Path(__file__))
    with pytest.raises(ValueError, match=f"write {scheme}s://"):
        Endpoint.parse(f"{scheme}://host", tls)
