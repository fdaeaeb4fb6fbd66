"""URLs: the scheme picks protocol and TLS. PEM files and headers: what would fail later is said."""

import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme

from triton_sam3 import AsyncClient, Client, endpoint
from triton_sam3.endpoint import DEFAULT_URL, TLS, Endpoint, validate_headers


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
        "http://host:0",
        "http://[::1",
        "grpc://a..b",
        f"http://{'a' * 64}.example",
    ],
)
def test_an_invalid_url_is_quoted_with_what_is_accepted(url: str) -> None:
    with pytest.raises(ValueError, match=r"is not a server URL; use grpc://") as caught:
        Endpoint.parse(url)
    assert repr(url) in str(caught.value)


@pytest.mark.parametrize("make", [Client, AsyncClient])
@pytest.mark.parametrize("url", [None, 8001, b"grpc://host", Path("host")])
def test_a_url_must_be_a_string(make: Any, url: Any) -> None:
    with pytest.raises(ValueError, match=r"is not a server URL; use grpc://"):
        make(url)


@pytest.mark.parametrize(
    "url",
    ["grpc://me:secret@host:1", "http://me:sec/ret@host", "ftp://secret@host", "https://[secret@"],
)
def test_a_password_in_a_url_is_rejected_and_not_quoted(url: str) -> None:
    with pytest.raises(ValueError, match="must not contain a user name or a password") as caught:
        Endpoint.parse(url)
    assert "sec" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://host?token=secret", "grpc://?secret", "http://h#secret"])
def test_a_query_in_a_url_is_rejected_and_not_quoted(url: str) -> None:
    with pytest.raises(ValueError, match=r"must not contain a (query|fragment)") as caught:
        Endpoint.parse(url)
    assert "secret" not in str(caught.value)


@pytest.fixture
def pem(tmp_path: Path) -> dict[str, Path]:
    """A client's key and certificate, another's key, and a file that is no PEM."""
    authority = trustme.CA()
    mine, other = authority.issue_cert("client"), authority.issue_cert("other")
    files = {name: tmp_path / f"{name}.pem" for name in ("key", "chain", "other", "none")}
    mine.private_key_pem.write_to_path(files["key"])
    mine.cert_chain_pems[0].write_to_path(files["chain"])
    other.private_key_pem.write_to_path(files["other"])
    files["none"].write_text("no PEM")
    return files


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_pem_files_for_a_url_without_tls_are_rejected(scheme: str, pem: dict[str, Path]) -> None:
    tls = TLS(root_certificates=pem["chain"])
    with pytest.raises(ValueError, match=f"use {scheme}s://"):
        Endpoint.parse(f"{scheme}://host", tls)


def test_a_private_key_without_a_certificate_is_rejected(pem: dict[str, Path]) -> None:
    TLS(private_key=pem["key"], certificate_chain=pem["chain"])
    for half in ({"private_key": pem["key"]}, {"certificate_chain": pem["chain"]}):
        with pytest.raises(ValueError, match="pass both or neither"):
            TLS(**half)


def test_pem_files_that_cannot_be_used_are_named(pem: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"cannot be used \('.*none\.pem'\)"):
        TLS(root_certificates=pem["none"])
    for key in (pem["none"], pem["other"]):
        with pytest.raises(ValueError, match=rf"cannot be used .*{key.name}"):
            TLS(private_key=key, certificate_chain=pem["chain"])


def test_the_systems_authorities_can_be_set_by_the_environment(
    pem: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(pem["chain"]))
    assert TLS().authorities == str(pem["chain"])
    assert TLS(root_certificates=pem["chain"]).authorities == pem["chain"]
    monkeypatch.setenv("SSL_CERT_FILE", "nowhere.pem")
    assert TLS().authorities is None


def test_a_folder_of_authorities_is_replaced_by_the_file_beside_it(
    pem: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Ubuntu, whose OpenSSL names no file, and gRPC reads nothing else."""
    found: Any = ssl.get_default_verify_paths()
    known = found._replace(cafile=None)
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: known)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    monkeypatch.setattr(endpoint, "_BUNDLES", ("nowhere.pem", str(pem["chain"])))
    assert TLS().authorities == str(pem["chain"])
    monkeypatch.setenv("SSL_CERT_DIR", "elsewhere")
    assert TLS().authorities is None


def test_headers_that_both_protocols_accept() -> None:
    headers = {"Authorization": "Bearer a b~", "x-sam3.tenant_1": ""}
    assert validate_headers(headers) == headers
    assert validate_headers(None) == {}


@pytest.mark.parametrize("make", [Client, AsyncClient])
@pytest.mark.parametrize("value", ["secret\n", "secrét", "secret\r\nx: y", b"secret", 5, None])
def test_an_invalid_header_value_is_not_quoted(make: Any, value: Any) -> None:
    with pytest.raises(ValueError, match="value of header 'x-token' must be") as caught:
        make("grpc://host", headers={"fine": "yes", "x-token": value})
    assert "secr" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "x y", "x:y", "grpc-timeout", "x-Bin", "ü", "x\n", 5])
def test_an_invalid_header_name_is_given_by_number_and_not_quoted(name: Any) -> None:
    with pytest.raises(ValueError, match=r"name of header 2 is not valid: use letters") as caught:
        validate_headers({"fine": "yes", name: "value"})
    assert repr(name) not in str(caught.value)


@pytest.mark.parametrize("make", [Client, AsyncClient])
@pytest.mark.parametrize(
    "name",
    [
        "Content-Length",
        "transfer-encoding",
        "content-encoding",
        "Accept-Encoding",
        "inference-header-content-length",
        "host",
        "connection",
        "expect",
        "te",
    ],
)
def test_headers_that_frame_the_request_are_rejected(make: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"header '{name}' says how a request is sent"):
        make("http://host", headers={name: "0"})
