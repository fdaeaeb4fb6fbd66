"""`python -m server REPOSITORY`: serve a model repository until Ctrl-C or SIGTERM."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from server import failure
from server.command import GRPC_PORT, HTTP_PORT, METRICS_PORT
from server.errors import ServerError, SetupError
from server.triton import TritonServer

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
Handler = Callable[[int, FrameType | None], NoReturn] | signal.Handlers
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 chooses a free port.")]


class _Stopped(BaseException):
    """The first SIGINT or SIGTERM."""


def serve(
    repository: Annotated[Path, typer.Argument(help="A folder of Triton models.")],
    host: Annotated[str, typer.Option(help="IPv4 address to listen on.")] = "127.0.0.1",
    http_port: Port = HTTP_PORT,
    grpc_port: Port = GRPC_PORT,
    metrics_port: Port = METRICS_PORT,
    log: Annotated[Path | None, typer.Option(help="File to append the server's output to.")] = None,
    start_timeout: Annotated[float, typer.Option(min=1, help="Seconds until ready.")] = 600.0,
) -> None:
    """Serve REPOSITORY with a real tritonserver: the one on PATH, or else nvidia-pytriton's."""
    server = TritonServer(
        repository,
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        log=log,
        start_timeout=start_timeout,
    )
    sys.exit(_run_until_stopped(server, log))


def _run_until_stopped(server: TritonServer, log: Path | None) -> int:
    try:
        _on_stop_signals(_stop)
        return _run(server, log)
    except _Stopped:
        return 0
    finally:
        server.stop()


def _run(server: TritonServer, log: Path | None) -> int:
    err = Console(stderr=True, soft_wrap=True)
    try:
        with err.status(f"Starting tritonserver on {escape(str(server.repository))}"):
            server.start()
        if not server.address.is_loopback:
            err.print("Anyone who can reach this machine can use the server.", style="yellow")
        Console(soft_wrap=True).print(server.http_url, server.grpc_url, server.metrics_url)
        status = server.wait()
        err.print(f"tritonserver exited unexpectedly (status {status}).", style="red")
        err.print(failure.tail(server.read_log()), markup=False)
    except SetupError as error:
        err.print(str(error), style="red", markup=False)
        return 2
    except ServerError as error:
        err.print(str(error), style="red", markup=False)
    err.print(
        f"See {log} for all of its output." if log else "Use --log FILE for all of its output."
    )
    return 1


def _on_stop_signals(handler: Handler) -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, handler)


def _stop(_number: int, _frame: FrameType | None) -> NoReturn:
    _on_stop_signals(signal.SIG_IGN)  # nothing may interrupt the clean-up that follows
    raise _Stopped


if __name__ == "__main__":
    typer.run(serve)
