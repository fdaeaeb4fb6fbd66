"""The container's process 1, run as in the image except for its ports and folders."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

from benchmarks.environment import ROOT
from benchmarks.fuzz.census import is_alive, part
from docker.entrypoint.probes import ProbeFailed, Target, startup
from server import failure

START_SECONDS = 240.0
END_SECONDS = 30.0
PORTS = range(16384, 32768)
"""Below the ephemeral ports that Linux uses for connections (ip_local_port_range)."""


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now, and that the system assigns to no connection either.

    A server binds its ports only when its models are loaded, seconds later.
    """
    found: list[int] = []
    with ExitStack() as held:
        while len(found) < count:
            port = secrets.choice(PORTS)
            with suppress(OSError):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
                found.append(port)
    return found


class Container:
    """`python -m docker.entrypoint serve`; a context manager that leaves nothing behind.

    wrapper: a command that runs the command appended to it, such as `unshare --mount`.
    env: variables in addition to this process's own.
    """

    def __init__(
        self,
        repository: Path,
        folder: Path,
        *arguments: str,
        wrapper: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.http_port, self.grpc_port, self.metrics_port = free_ports(3)
        self.folder = folder
        self.drain_mark = folder / "draining"
        self.log = folder / "output"
        ports = ("http", "grpc", "metrics")
        self._command = [
            *wrapper,
            *(sys.executable, "-m", "docker.entrypoint", "serve", str(repository)),
            *(f"--{name}-port={getattr(self, f'{name}_port')}" for name in ports),
            f"--drain-mark={self.drain_mark}",
            *arguments,
        ]
        self._env = dict(env or {})
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def target(self) -> Target:
        return Target("127.0.0.1", self.http_port, self.metrics_port, self.drain_mark)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("this container has not been started")
        return self._process

    def start(self) -> Container:
        """Start it without waiting."""
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._env},
            )
        return self

    def wait_until_serving(self) -> Container:
        """Wait until the startup probe passes. Raises RuntimeError if it exits or takes too long.

        If a transient failure in Triton made it exit, it is restarted, as by a restart policy.
        """
        deadline = time.monotonic() + START_SECONDS
        while True:
            if self.process.poll() is not None:
                said = self.log.read_text()[-3000:]
                if not failure.is_transient(said[-500:]):
                    raise RuntimeError(f"it exited while starting: {said}")
                self.start()
            try:
                startup(self.target, 60.0)
                return self
            except ProbeFailed as unready:
                if time.monotonic() > deadline:
                    said = self.log.read_text()[-3000:]
                    raise RuntimeError(f"not serving: {unready}: {said}") from unready
                time.sleep(0.2)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal process 1, wait for it, and return its exit status."""
        self.process.send_signal(number)
        return self.process.wait(180)

    def descendants(self) -> list[psutil.Process]:
        """Keeper, tritonserver and stubs; none once process 1 has exited."""
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def triton(self) -> psutil.Process:
        """tritonserver itself. Raises LookupError while there is none."""
        for process in self._running("tritonserver"):
            return process
        raise LookupError("tritonserver is not running")

    def stubs(self, model: str) -> list[psutil.Process]:
        """The Python stubs that serve `model`, one per instance."""
        return self._running(model)

    def _running(self, name: str) -> list[psutil.Process]:
        """Descendants of that name; those that exit meanwhile are left out."""
        found = []
        for process in self.descendants():
            with suppress(psutil.NoSuchProcess):
                if part(process) == name:
                    found.append(process)
        return found

    def records(self) -> list[dict[str, str]]:
        """Its log records; every line must be JSON."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def call(self, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        """Status and body of one HTTP call."""
        url = f"http://127.0.0.1:{self.http_port}{path}"
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(url, data=body, headers=names)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def __enter__(self) -> Container:
        return self.start()

    def __exit__(self, *_: object) -> None:
        family = self.descendants()
        if self.process.poll() is None:
            self.process.kill()  # the keeper notices and stops the rest
            self.process.wait()
        deadline = time.monotonic() + END_SECONDS
        while any(is_alive(process.pid) for process in family) and time.monotonic() < deadline:
            time.sleep(0.05)
