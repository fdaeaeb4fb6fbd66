"""The command line of tritonserver, in one place."""

import ipaddress
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from server.errors import SetupError

HTTP_PORT, GRPC_PORT, METRICS_PORT = 8000, 8001, 8002
"""Triton's own defaults."""

EXIT_TIMEOUT_SECONDS = 5
ADMINISTRATION = "model-repository,trace,logging"

ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**20),
    "MALLOC_TRIM_THRESHOLD_": str(4 * 2**20),
    # Triton would load the models on every GPU, but kept images live on one.
    "CUDA_VISIBLE_DEVICES": "0",
    # ONNX Runtime's Linux wheels report to Microsoft by default.
    "ORT_DISABLE_TELEMETRY": "1",
}
"""Variables for tritonserver unless the caller sets them. MALLOC_*: glibc's thresholds. A buffer
larger than the first is returned to the system as soon as it is freed, as is free memory at the end
of a heap beyond the second. Left alone, glibc raises both with the largest buffer freed, to 32 and
64 MiB in each of its heaps: requests of many sizes then made tritonserver grow without bound."""


@dataclass(frozen=True)
class Address:
    """Where a server listens: one numeric IPv4 address and three TCP ports."""

    host: str
    http_port: int
    grpc_port: int
    metrics_port: int

    @property
    def ports(self) -> set[int]:
        """All three ports."""
        return {self.http_port, self.grpc_port, self.metrics_port}

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return ipaddress.ip_address(self.host).is_loopback

    @property
    def reachable_host(self) -> str:
        """The host to use in a URL: a wildcard address is reached through loopback."""
        return "127.0.0.1" if self.host == "0.0.0.0" else self.host


def command_line(
    executable: Path,
    repository: Path,
    address: Address,
    *,
    shm_prefix: str,
    backend_directory: Path | None = None,
    extra_args: Sequence[str] = (),
) -> list[str]:
    """The arguments that start `executable` on `repository`.

    - no model control, which is Triton's default: whoever may load a model may run any code.
    - model repository, trace and log settings are refused to everybody: whoever may set the log or
      trace file may write any file. Beyond loopback, so is shared memory.
    - no auto-completion: the configs are complete, and anything missing is an error.
    - a short exit timeout: a model that is still loading would delay the exit by 30 s.
    - `shm_prefix`: distinguishes this server's shared memory from any other's.

    `extra_args` come last: they win where Triton takes an option only once. Raises SetupError if
    they move or close an endpoint, because nobody could find it then.
    """
    listen = {
        "--http-address": address.host,
        "--http-port": address.http_port,
        "--grpc-address": address.host,
        "--grpc-port": address.grpc_port,
        "--metrics-address": address.host,
        "--metrics-port": address.metrics_port,
    }
    fixed = {*listen, "--allow-http", "--allow-grpc", "--allow-metrics"}
    if clash := sorted(fixed & {arg.split("=")[0] for arg in extra_args}):
        raise SetupError(
            f"extra_args must not contain {', '.join(clash)}: all three endpoints are always open, "
            "on the host and ports that are passed separately."
        )
    return [
        str(executable),
        f"--model-repository={repository}",
        "--disable-auto-complete-config",
        *(f"{option}={value}" for option, value in listen.items()),
        *_restrictions(
            ADMINISTRATION if address.is_loopback else f"{ADMINISTRATION},shared-memory"
        ),
        f"--exit-timeout-secs={EXIT_TIMEOUT_SECONDS}",
        f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
        *([f"--backend-directory={backend_directory}"] if backend_directory else []),
        *extra_args,
    ]


def _restrictions(apis: str) -> list[str]:
    """Triton restricts by a header's name and value; no request can carry this header.

    Otherwise whoever lists the host's processes could read the value and send it. Over HTTP, a line
    break ends both. gRPC accepts one in a value, if not from its own clients, but in no name.
    """
    guard = f"{apis}:nobody\n={secrets.token_hex()}\n"
    return [f"--http-restricted-api={guard}", f"--grpc-restricted-protocol={guard}"]
