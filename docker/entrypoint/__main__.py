"""The command line of `docker.entrypoint`; argparse, since the image has nothing else."""

import argparse
import sys
import time
from collections.abc import Sequence
from ipaddress import IPv4Address
from pathlib import Path

import docker.entrypoint
from docker.entrypoint import drain
from docker.entrypoint.probes import PROBES, ProbeFailed, Target
from docker.entrypoint.serve import Options, serve
from server.command import GRPC_PORT, HTTP_PORT, METRICS_PORT, Address

DRAIN_SECONDS_HELP = "seconds to wait for proxies to notice the drain"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    args = parse(sys.argv[1:] if argv is None else argv)
    status: int = args.run(args)
    return status


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments; those after `--` go to tritonserver unchanged. Exits if invalid."""
    given = list(argv)
    end = given.index("--") if "--" in given else len(given)
    args = _parser().parse_args(given[:end])
    args.triton_args = given[end + 1 :]
    return args


def _serve(args: argparse.Namespace) -> int:
    return serve(
        Options(
            repository=args.repository,
            address=Address(str(args.host), args.http_port, args.grpc_port, args.metrics_port),
            drain_mark=args.drain_mark,
            drain_seconds=args.drain_seconds,
            exit_seconds=args.exit_seconds,
            watch_seconds=args.watch_seconds,
            watch_timeout=args.watch_timeout,
            otlp_url=args.otlp_url,
            trace_rate=args.trace_rate,
            extra_args=args.triton_args,
        )
    )


def _probe(args: argparse.Namespace) -> int:
    address = Address(str(args.host), args.http_port, GRPC_PORT, args.metrics_port)
    target = Target(address.reachable_host, args.http_port, args.metrics_port, args.drain_mark)
    try:
        print(PROBES[args.question](target, args.timeout))
    except ProbeFailed as failure:
        print(f"{args.question}: {failure}", file=sys.stderr)
        return 1
    return 0


def _drain(args: argparse.Namespace) -> int:
    drain.mark(args.drain_mark)
    time.sleep(drain.remaining(args.drain_mark, args.drain_seconds))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="docker.entrypoint",
        description=docker.entrypoint.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)
    serve_help = "run tritonserver until SIGTERM; arguments after -- go to tritonserver"
    _add_serve(commands.add_parser("serve", help=serve_help))
    _add_probe(commands.add_parser("probe", help="check a running server"))
    _add_drain(
        commands.add_parser("drain", help="mark the server as draining, wait for proxies to notice")
    )
    for command in commands.choices.values():
        command.formatter_class = argparse.ArgumentDefaultsHelpFormatter
        command.add_argument(
            "--drain-mark",
            type=Path,
            default=Path("/tmp/draining"),
            help="file that marks the server as draining",
        )
    return parser


def _add_serve(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=_serve)
    command.add_argument("repository", type=Path, help="folder of the exported models")
    _add_host(command, "IPv4 address to listen on; if not the default, probes need it too")
    _add_ports(command)
    command.add_argument("--grpc-port", type=int, default=GRPC_PORT, help="gRPC port")
    command.add_argument(
        "--drain-seconds", type=float, default=Options.drain_seconds, help=DRAIN_SECONDS_HELP
    )
    command.add_argument(
        "--exit-seconds",
        type=int,
        default=Options.exit_seconds,
        help="seconds granted to requests in flight after that",
    )
    command.add_argument(
        "--watch-seconds",
        type=float,
        default=Options.watch_seconds,
        help="seconds between liveness checks; three failures stop the server; 0 disables",
    )
    command.add_argument(
        "--watch-timeout",
        type=float,
        default=Options.watch_timeout,
        help="seconds that one check may take; must exceed the time to encode an image",
    )
    command.add_argument(
        "--otlp-url", help="where to send traces, e.g. http://collector:4318/v1/traces"
    )
    command.add_argument(
        "--trace-rate",
        type=int,
        default=Options.trace_rate,
        help="trace one in this many requests without a trace context of their own; 0: none",
    )


def _add_probe(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=_probe)
    command.add_argument("question", choices=sorted(PROBES))
    _add_host(command, "IPv4 address that the server listens on")
    _add_ports(command)
    command.add_argument("--timeout", type=float, default=10.0, help="seconds")


def _add_drain(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=_drain)
    command.add_argument(
        "--drain-seconds", type=float, default=Options.drain_seconds, help=DRAIN_SECONDS_HELP
    )


def _add_host(command: argparse.ArgumentParser, explanation: str) -> None:
    command.add_argument(
        "--host", type=IPv4Address, default=IPv4Address("0.0.0.0"), help=explanation
    )


def _add_ports(command: argparse.ArgumentParser) -> None:
    command.add_argument("--http-port", type=int, default=HTTP_PORT, help="HTTP port")
    command.add_argument("--metrics-port", type=int, default=METRICS_PORT, help="metrics port")


if __name__ == "__main__":
    sys.exit(main())
