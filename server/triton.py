"""`TritonServer`: starts, checks and stops one tritonserver with its Python stubs."""

import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from server import failure, ports
from server.command import Address
from server.errors import RepositoryError, StartError
from server.family import Family
from server.health import Probe

POLL_SECONDS = 0.05
START_ATTEMPTS = 3


class TritonServer:
    """A model repository under a real tritonserver; a context manager.

    repository: a folder of models, each with a `config.pbtxt`.
    host: the IPv4 address to listen on, or a name for it. Requests for model control, log and
        trace settings are always refused, and beyond loopback those for shared memory.
    http_port, grpc_port, metrics_port: None or 0 chooses a free port, kept across restarts.
    log: file to append the output of the server and its stubs to.
    extra_args: appended to tritonserver's command line; paths must be absolute, because it runs in
        a temporary folder.
    env: variables added to the caller's own environment.
    start_timeout: seconds until ready, including the canary.

    Starting raises a SetupError before anything runs (no tritonserver, no repository, a port in
    use) or a StartError that says which model failed and why.
    """

    def __init__(
        self,
        repository: Path,
        *,
        host: str = "127.0.0.1",
        http_port: int | None = None,
        grpc_port: int | None = None,
        metrics_port: int | None = None,
        log: Path | None = None,
        extra_args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        start_timeout: float = 600.0,
    ) -> None:
        self.repository = Path(repository)
        self._host = host
        self._ports = (http_port, grpc_port, metrics_port)
        self._log = log
        self._extra_args = tuple(extra_args)
        self._env = dict(env or {})
        self._start_timeout = start_timeout
        self._address: Address | None = None
        self._family: Family | None = None

    @property
    def address(self) -> Address:
        """Host and ports; known once the server has been started."""
        if self._address is None:
            raise RuntimeError("The server was never started: it has no address yet.")
        return self._address

    @property
    def http_url(self) -> str:
        """`http://host:port`."""
        return f"http://{self.address.reachable_host}:{self.address.http_port}"

    @property
    def grpc_url(self) -> str:
        """`grpc://host:port`."""
        return f"grpc://{self.address.reachable_host}:{self.address.grpc_port}"

    @property
    def metrics_url(self) -> str:
        """`http://host:port/metrics`, in Prometheus' text format."""
        return f"http://{self.address.reachable_host}:{self.address.metrics_port}/metrics"

    @property
    def pid(self) -> int:
        """The process id of tritonserver itself, as of the latest start."""
        return self._latest.pid

    def is_alive(self) -> bool:
        """Whether tritonserver is running. If not, its stubs have exited as well."""
        return self._family is not None and self._family.returncode() is None

    def start(self) -> "TritonServer":
        """Start tritonserver; return when it is ready and has answered a canary inference."""
        if self.is_alive():
            raise RuntimeError(f"The server is already running (process {self.pid}).")
        self.stop()
        check_repository(self.repository)
        for attempt in range(1, START_ATTEMPTS + 1):
            self._address = self._address or ports.choose(self._host, *self._ports)
            try:
                self._launch(self._address)
                break
            except StartError as error:
                lost_port = self._lost_port_race(str(error))
                if attempt == START_ATTEMPTS or not (lost_port or failure.is_transient(str(error))):
                    raise
                self._address = None if lost_port else self._address
        return self

    def stop(self) -> None:
        """Stop tritonserver; requests in flight get a few seconds. Safe to call at any time."""
        if self._family is not None:
            self._family.stop(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL tritonserver and its stubs."""
        if self._family is not None:
            self._family.stop(signal.SIGUSR1)

    def wait(self) -> int:
        """Wait until tritonserver exits on its own and return its exit status."""
        return self._latest.wait()

    def read_log(self) -> str:
        """The output of the server and its stubs since the latest start."""
        return self._latest.read_log()

    def __enter__(self) -> "TritonServer":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def _latest(self) -> Family:
        if self._family is None:
            raise RuntimeError("The server was never started.")
        return self._family

    def _launch(self, address: Address) -> None:
        deadline = time.monotonic() + self._start_timeout
        self._family = Family(
            self.repository, address, extra_args=self._extra_args, env=self._env, log=self._log
        )
        try:
            self._wait_until_ready(self._family, address, deadline)
        except BaseException:
            self.kill()
            raise

    def _wait_until_ready(self, family: Family, address: Address, deadline: float) -> None:
        probe = Probe(address.reachable_host, address.http_port)
        # Check the ports too: another server that took one in the meantime would answer instead.
        while not (address.ports <= ports.listened_on(family.pid) and probe.is_ready()):
            log = family.read_log()
            if family.returncode() is not None or failure.is_doomed(log):
                raise StartError(failure.explain(log))
            if time.monotonic() > deadline:
                timeout = f"Not ready after {self._start_timeout:g} s. The end of the log:"
                raise StartError(f"{timeout}\n{failure.tail(log)}")
            time.sleep(POLL_SECONDS)
        try:
            probe.canary(timeout=max(1.0, deadline - time.monotonic()))
        except OSError as error:
            raise StartError(f"No answer to the canary inference: {error}") from error

    def _lost_port_race(self, message: str) -> bool:
        return not all(self._ports) and "already in use" in message


def check_repository(path: Path) -> None:
    """Raise RepositoryError unless `path` is a readable folder with at least one model in it."""
    if not path.is_dir():
        reason = "it is not a folder" if path.exists() else "there is no such folder"
        raise RepositoryError(
            f"No model repository at {path}: {reason}. "
            f"Build one with: python -m export --checkpoint CHECKPOINT --output {path}"
        )
    if not os.access(path, os.R_OK | os.X_OK, effective_ids=True):
        raise RepositoryError(
            f"User {os.geteuid()} may not read {path}. "
            f"Make it and everything in it readable: chmod --recursive o+rX {path}"
        )
    if not any(path.glob("*/config.pbtxt")):
        raise RepositoryError(
            f"{path} is not a model repository: no folder in it has a config.pbtxt."
        )
