"""The container's process 1, run as it is in the image but for its ports and folders."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environment import ROOT
from docker.entrypoint.probes import ProbeFailed, Target, startup
from server import failure

START_SECONDS = 240.0
END_SECONDS = 30.0


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on now."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for holder in sockets:
            holder.bind(("127.0.0.1", 0))
        return [int(holder.getsockname()[1]) for holder in sockets]


class Container:
    """`python -m docker.entrypoint serve`; a context manager that leaves nothing behind.

    wrapper: a command that runs the one it is given, such as `unshare --mount`.
    env: variables on top of this process's own.
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
            raise RuntimeError("this container was never started")
        return self._process

    def start(self) -> Container:
        """Start it, without waiting."""
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
        """Until the startup probe passes. Raises RuntimeError if it ends or takes too long.

        One that ended by Triton's own accident is started again, as a restart policy would.
        """
        deadline = time.monotonic() + START_SECONDS
        while True:
            if self.process.poll() is not None:
                said = self.log.read_text()[-3000:]
                if not failure.is_chance(said[-500:]):
                    raise RuntimeError(f"it ended while starting: {said}")
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
        """Signal process 1 and wait; its exit status."""
        self.process.send_signal(number)
        return self.process.wait(180)

    def descendants(self) -> list[Process]:
        """Keeper, tritonserver and stubs."""
        return list(_below(self.process.pid))

    def triton(self) -> Process:
        """tritonserver itself. Raises LookupError while there is none."""
        for process in self.descendants():
            if process.command.split(" ")[0].endswith("tritonserver"):
                return process
        raise LookupError("no tritonserver runs")

    def stubs(self, model: str) -> list[Process]:
        """The Python stubs that serve `model`, one for each instance."""
        return [p for p in self.descendants() if "_stub" in p.command and f"/{model}/" in p.command]

    def records(self) -> list[dict[str, str]]:
        """What it logged; every line must be JSON."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def call(self, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        """Status and body of one HTTP call."""
        url = f"http://127.0.0.1:{self.http_port}{path}"
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(url, data=body, headers=names)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def __enter__(self) -> Container:
        return self.start()

    def __exit__(self, *_: object) -> None:
        family = self.descendants()
        if self.process.poll() is None:
            self.process.kill()  # the keeper notices and ends the rest
            self.process.wait()
        deadline = time.monotonic() + END_SECONDS
        while any(process.runs for process in family) and time.monotonic() < deadline:
            time.sleep(0.05)


@dataclass(frozen=True)
class Process:
    """A process by its id."""

    pid: int
    command: str

    @property
    def runs(self) -> bool:
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        return state != "Z"

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)


def _below(pid: int) -> Iterator[Process]:
    """Those that end while one looks are left out."""
    try:
        tasks = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return
    for child in map(int, " ".join(tasks).split()):
        try:
            raw = Path(f"/proc/{child}/cmdline").read_bytes()
        except OSError:
            continue
        yield Process(child, raw.replace(b"\0", b" ").decode())
        yield from _below(child)
