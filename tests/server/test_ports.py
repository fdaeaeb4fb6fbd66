import socket
import subprocess
import sys
from pathlib import Path

import pytest

from server import PortInUseError, SetupError, ports


def test_free_ports_differ_and_can_be_bound() -> None:
    address = ports.choose("127.0.0.1", None, 0, None)
    chosen = {address.http_port, address.grpc_port, address.metrics_port}
    assert len(chosen) == 3
    for port in chosen:
        with socket.create_server(("127.0.0.1", port)):
            pass


def test_a_name_becomes_an_address() -> None:
    assert ports.choose("localhost", None, None, None).host == "127.0.0.1"


def test_a_given_port_is_kept() -> None:
    free = ports.choose("127.0.0.1", None, None, None)
    assert ports.choose("127.0.0.1", None, free.grpc_port, None).grpc_port == free.grpc_port


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortInUseError, match=rf"127\.0\.0\.1:{port} for gRPC: .*in use"):
            ports.choose("127.0.0.1", None, port, None)


def test_a_port_with_closing_connections_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            listener.accept()[0].close()  # closed first on this side: TIME_WAIT here
    assert ports.choose("127.0.0.1", port, None, None).http_port == port


@pytest.mark.parametrize(
    ("host", "wanted", "message"),
    [
        ("127.0.0.1", (8000, 8000, None), "must differ, not: HTTP 8000, gRPC 8000, metrics 0"),
        ("127.0.0.1", (None, 65536, None), "gRPC port must be from 0 to 65535, not 65536"),
        ("127.0.0.1", (-1, None, None), "HTTP port must be from 0 to 65535, not -1"),
        ("192.0.2.7", (None, None, None), "192.0.2.7 is not an IPv4 address of this machine"),
        ("", (None, None, None), "'' is not an IPv4 address; give 0.0.0.0"),
        ("<broadcast>", (None, None, None), "'<broadcast>' is not an IPv4 address"),
        ("no.such.host.invalid", (None, None, None), "is not an IPv4 address of this machine"),
    ],
)
def test_impossible_ports_and_hosts_are_rejected(
    host: str, wanted: tuple[int | None, int | None, int | None], message: str
) -> None:
    with pytest.raises(SetupError, match=message):
        ports.choose(host, *wanted)


LISTENER = """
import socket, sys
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
sys.stdin.read()
"""


def test_listeners_are_found_without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without IPv6 has no table for it."""
    exists, read = Path.exists, Path.read_text

    def read_text(path: Path) -> str:
        if path.name == "tcp6":
            raise FileNotFoundError(path)
        return read(path)

    monkeypatch.setattr(Path, "exists", lambda path: path.name != "tcp6" and exists(path))
    monkeypatch.setattr(Path, "read_text", read_text)
    command = [sys.executable, "-c", LISTENER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        assert ports.listened_on(process.pid) == {port}
