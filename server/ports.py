"""TCP ports: which are free, and which ones a process listens on."""

import errno
import socket
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from server.command import Address
from server.errors import PortInUseError, SetupError

MAX_PORT = 65535
_LISTENING = "0A"  # TCP_LISTEN in /proc/net/tcp


def choose(
    host: str, http_port: int | None, grpc_port: int | None, metrics_port: int | None
) -> Address:
    """The three ports as requested, or free ones for None or 0.

    A free port is only free for now: starting a server on it may lose a race with another process.
    Raises PortInUseError, and SetupError for anything that can never be listened on.
    """
    if host in ("", "<broadcast>"):  # Python's names for all interfaces and 255.255.255.255
        raise SetupError(f"{host!r} is not an IPv4 address; give 0.0.0.0 for all interfaces.")
    wanted = {"HTTP": http_port or 0, "gRPC": grpc_port or 0, "metrics": metrics_port or 0}
    _check(wanted)
    with ExitStack() as held:  # all held at once, or two of them could be the same
        bound = [_hold(held, host, port, name) for name, port in wanted.items()]
    return Address(bound[0][0], *(port for _, port in bound))


def listened_on(pid: int) -> set[int]:
    """The ports on which the process itself listens; none if it has exited."""
    proc = Path(f"/proc/{pid}")
    with suppress(FileNotFoundError, ProcessLookupError):
        sockets = {str(descriptor.readlink()) for descriptor in (proc / "fd").iterdir()}
        families = [proc / "net" / name for name in ("tcp", "tcp6")]
        # A kernel without IPv6 has no such table.
        tables = [table.read_text() for table in families if table.exists()]
        rows = [line.split() for table in tables for line in table.splitlines()[1:]]
        return {
            int(row[1].rpartition(":")[2], base=16)
            for row in rows
            if row[3] == _LISTENING and f"socket:[{row[9]}]" in sockets
        }
    return set()


def _check(wanted: Mapping[str, int]) -> None:
    given = [port for port in wanted.values() if port]
    if len(set(given)) < len(given):
        listed = ", ".join(f"{name} {port}" for name, port in wanted.items())
        raise SetupError(f"The three ports must differ, not: {listed}.")
    for name, port in wanted.items():
        if not 0 <= port <= MAX_PORT:
            raise SetupError(f"The {name} port must be from 0 to {MAX_PORT}, not {port}.")


def _hold(held: ExitStack, host: str, port: int, name: str) -> tuple[str, int]:
    """The numeric address (Triton's HTTP endpoint does not resolve names) and the port."""
    holder = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    # A port whose last connections are still closing (TIME_WAIT) is free for a server.
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        holder.bind((host, port))
        holder.listen()  # only a listener keeps others with SO_REUSEADDR away
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
            raise SetupError(f"{host} is not an IPv4 address of this machine.") from error
        raise PortInUseError(
            f"Cannot use {host}:{port} for {name}: {error.strerror}. Stop what is listening there, "
            "or choose another port (0 for a free one)."
        ) from error
    numeric, chosen = holder.getsockname()
    return str(numeric), int(chosen)
