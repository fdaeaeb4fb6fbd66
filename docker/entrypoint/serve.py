"""Process 1 of the container: tritonserver from a guarded start to a graceful shutdown.

    this process ── keeper ── tritonserver ── Python stubs
        │ SIGTERM: mark as draining, wait until proxies notice, let requests in flight finish
        │ every `watch_seconds`: liveness check; three failures in a row: stop everything, exit 1
        └ its output, as JSON lines

It never restarts tritonserver: it exits, and the container's restart policy starts a clean one.
Everything that must hold for a served model is decided here, on one command line.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from docker.entrypoint import drain, logs
from docker.entrypoint.engines import EngineCaches
from docker.entrypoint.probes import ProbeFailed, Target, live, loaded
from server import installation, keeper
from server.command import ENVIRONMENT, Address, command_line
from server.errors import ServerError
from server.triton import check_repository

MAX_FAILURES = 3
KILL_AFTER_SECONDS = 5
"""On top of the time granted to requests in flight: unloading the models takes time as well."""
POLL_SECONDS = 0.1
EXIT_UNHEALTHY = 1


@dataclass(frozen=True)
class Options:
    """How to serve.

    repository: a model repository; it may be read-only.
    address: where to listen. Model control, log and trace settings are refused to everybody, and
        beyond loopback so is client shared memory.
    drain_seconds: from the drain mark until Triton is told to stop.
    exit_seconds: how long requests in flight may then take.
    watch_seconds: time between liveness checks; 0 if an orchestrator does them.
    watch_timeout: seconds that one check may take.
    otlp_url: where traces go; only requests that carry a trace context are traced, plus one in
        `trace_rate` of the others.
    extra_args: for tritonserver, after ours.
    """

    repository: Path
    address: Address
    drain_mark: Path
    drain_seconds: float = 5.0
    exit_seconds: int = 30
    watch_seconds: float = 0.0
    watch_timeout: float = 20.0
    otlp_url: str | None = None
    trace_rate: int = 0
    extra_args: Sequence[str] = ()


def arguments(options: Options) -> list[str]:
    """tritonserver's arguments beyond those of `server.command`."""
    return [
        f"--exit-timeout-secs={options.exit_seconds}",
        "--log-format=ISO8601",
        "--metrics-config=summary_latencies=true",
        *_tracing(options),
        *options.extra_args,
    ]


def _tracing(options: Options) -> list[str]:
    """Timestamps only: the level TENSORS would put images into traces."""
    if options.otlp_url is None:
        return []
    settings = (
        "mode=opentelemetry",
        "level=TIMESTAMPS",
        f"rate={options.trace_rate}",
        f"opentelemetry,url={options.otlp_url}",
        "opentelemetry,resource=service.name=triton-sam3",
    )
    return [f"--trace-config={setting}" for setting in settings]


def serve(options: Options) -> int:
    """Run until tritonserver exits or is found unhealthy, or SIGTERM arrives; the exit status."""
    try:
        check_repository(options.repository)
        server = _Server(options)
    except ServerError as error:
        return _refuse(str(error))
    except OSError as error:
        return _refuse(
            f"Temporary files cannot be written: {error}. If the root is read-only, "
            f"mount a tmpfs at /tmp that user {os.getuid()} may write to"
        )
    return server.run()


def _refuse(reason: str) -> int:
    logs.write(logs.event("entrypoint", reason, "fatal"), sys.stdout)
    return EXIT_UNHEALTHY


class _Server:
    """tritonserver under the keeper, which cleans up all its processes and shared memory."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._signals = 0
        """How many came. Only counted when they do: the main thread may hold any lock then."""
        self._unhealthy = False
        self._stopping = threading.Event()
        self._engines = EngineCaches(options.repository)
        # After a crash the pod's memory volumes still hold what the previous container left.
        options.drain_mark.unlink(missing_ok=True)
        self._shm_prefix = f"triton_sam3_port{options.address.http_port}_"
        work_dir = Path(tempfile.gettempdir(), f"triton-sam3-port{options.address.http_port}")
        keeper.remove_leftovers(self._shm_prefix, work_dir)
        work_dir.mkdir(mode=0o700)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        try:
            self._process = self._start(work_dir)
        except BaseException:
            keeper.remove_leftovers(self._shm_prefix, work_dir)
            raise

    def run(self) -> int:
        """Wait for the exit; the exit status, EXIT_UNHEALTHY if it had to be stopped."""
        assert self._process.stdout is not None
        pump = (self._engines.watch(self._process.stdout), sys.stdout)
        output = threading.Thread(target=logs.translate, args=pump, daemon=True)
        output.start()
        if self._options.watch_seconds:
            threading.Thread(target=self._watch, daemon=True).start()
        while self._process.poll() is None and not (self._signals or self._unhealthy):
            time.sleep(POLL_SECONDS)
        told_to_stop = self._process.poll() is None
        if told_to_stop:
            self._stopping.set()
            self._shut_down()
        status = self._process.wait()
        output.join(KILL_AFTER_SECONDS)  # a stub that outlives it keeps the pipe open
        if not told_to_stop:
            for sentence in self._engines.clear_failed():
                self._say(sentence, "error")
        return EXIT_UNHEALTHY if self._unhealthy else status

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._signals += 1

    def _shut_down(self) -> None:
        if self._unhealthy:
            self._process.send_signal(signal.SIGUSR1)
            return
        self._say("draining")
        drain.mark(self._options.drain_mark)
        end = time.monotonic() + drain.remaining(
            self._options.drain_mark, self._options.drain_seconds
        )
        while time.monotonic() < end and self._signals < 2:  # the second one skips the drain
            time.sleep(POLL_SECONDS)
        self._process.send_signal(signal.SIGTERM)

    def _watch(self) -> None:
        address, failures = self._options.address, 0
        target = Target(
            address.reachable_host,
            address.http_port,
            address.metrics_port,
            self._options.drain_mark,
        )
        started = False  # loading may take any time; tritonserver exits if it fails
        while not self._stopping.wait(self._options.watch_seconds):
            started = started or loaded(target, self._options.watch_timeout)
            if not started:
                continue
            try:
                live(target, self._options.watch_timeout)
                failures = 0
            except ProbeFailed as failure:
                failures += 1
                self._say(f"not alive ({failures} of {MAX_FAILURES}): {failure}", "error")
            if failures == MAX_FAILURES:
                self._unhealthy = True
                return

    def _start(self, work_dir: Path) -> "subprocess.Popen[str]":
        options = self._options
        found = installation.find(work_dir, os.environ)
        command = command_line(
            found.executable,
            options.repository.resolve(),
            options.address,
            shm_prefix=self._shm_prefix,
            backend_directory=found.backend_directory,
            extra_args=arguments(options),
        )
        process, report = keeper.spawn(
            command,
            shm_prefix=self._shm_prefix,
            work_dir=work_dir,
            grace=options.exit_seconds + KILL_AFTER_SECONDS,
            output=subprocess.PIPE,
            environment={**ENVIRONMENT, **os.environ, **found.environment},
        )
        with report:
            report.read()  # tritonserver's process id; the keeper waits until it is read
        return process

    def _say(self, message: str, level: str = "info") -> None:
        logs.write(logs.event("entrypoint", message, level), sys.stdout)
