"""Process 1 of the container: tritonserver from a guarded start to a drained end.

    this process ── keeper ── tritonserver ── Python stubs
        │ SIGTERM: mark as draining, wait until proxies noticed, let requests in flight finish
        │ every `watch_seconds`: is it alive? Not three times in a row: end it all, exit with 1
        └ its output, as JSON lines

It never restarts tritonserver itself: it exits, and the container's restart policy starts a
clean one. Everything that must hold of a served model is decided here, on one command line.
"""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
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

FAILURES_TO_END = 3
KILL_AFTER_SECONDS = 5
"""On top of the time requests in flight are given: unloading the models takes some as well."""
SICK = 1


@dataclass(frozen=True)
class Options:
    """How to serve.

    repository: a model repository; read only is enough.
    address: where to listen. Off loopback, model control, client shared memory, logging and trace
        settings are refused to everybody: their key is random and never leaves this process.
    drain_seconds: from the mark until requests in flight are waited for.
    exit_seconds: how long those may take.
    watch_seconds: between looks at whether it is alive; 0 where an orchestrator looks.
    watch_timeout: seconds one look may take.
    otlp_url: where traces go; only requests that carry a trace context are traced, unless
        `trace_rate` says one in how many others.
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


def without_model_control(command: Sequence[str]) -> list[str]:
    """What is loaded at the start is all that is ever loaded: Triton's mode `none`, its default.

    `server.command` loads in mode `explicit`, for developers who reload models in place.
    """
    explicit = ("--model-control-mode=", "--load-model=")
    return [argument for argument in command if not argument.startswith(explicit)]


def _tracing(options: Options) -> list[str]:
    """Times only: the level TENSORS would put images into traces."""
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
    """Run until tritonserver ends, is found dead or SIGTERM comes; the exit status."""
    try:
        check_repository(options.repository)
        server = _Server(options)
    except ServerError as error:
        return _refuse(str(error))
    except OSError as error:
        return _refuse(
            f"Its temporary files cannot be written: {error}. The root may be read only; "
            f"mount a tmpfs at /tmp that user {os.getuid()} may write to"
        )
    return server.run()


def _refuse(reason: str) -> int:
    logs.write(logs.event("entrypoint", reason, "fatal"), sys.stdout)
    return SICK


class _Server:
    """tritonserver under the keeper, which ends the whole family and its shared memory."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._stop, self._hurry = threading.Event(), threading.Event()
        self._sick = False
        self._engines = EngineCaches(options.repository)
        # After a crash the pod's memory volumes still hold what the last container left there.
        options.drain_mark.unlink(missing_ok=True)
        self._shm_prefix = f"triton_sam3_port{options.address.http_port}_"
        work_dir = Path(tempfile.gettempdir(), f"triton-sam3-port{options.address.http_port}")
        keeper.remove_leftovers(self._shm_prefix, work_dir)
        work_dir.mkdir(mode=0o700)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self._process = self._start(work_dir)

    def run(self) -> int:
        """Until the end; SICK if it had to be ended."""
        assert self._process.stdout is not None
        pump = (self._engines.overhear(self._process.stdout), sys.stdout)
        output = threading.Thread(target=logs.translate, args=pump, daemon=True)
        output.start()
        if self._options.watch_seconds:
            threading.Thread(target=self._watch, daemon=True).start()
        while self._process.poll() is None and not self._stop.wait(0.2):
            pass
        if self._process.poll() is None:
            self._end()
        status = self._process.wait()
        output.join(KILL_AFTER_SECONDS)  # a stub that outlived it would hold the pipe open
        if not self._stop.is_set():
            for sentence in self._engines.clear_blamed():
                self._say(sentence, "error")
        return SICK if self._sick else status

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        (self._hurry if self._stop.is_set() else self._stop).set()

    def _end(self) -> None:
        if self._sick:
            self._process.send_signal(signal.SIGUSR1)
            return
        self._say("draining")
        drain.mark(self._options.drain_mark)
        self._hurry.wait(drain.remaining(self._options.drain_mark, self._options.drain_seconds))
        self._process.send_signal(signal.SIGTERM)

    def _watch(self) -> None:
        address, failures = self._options.address, 0
        target = Target(
            address.reachable_host,
            address.http_port,
            address.metrics_port,
            self._options.drain_mark,
        )
        started = False  # loading may take as long as it takes; a failed load ends tritonserver
        while not self._stop.wait(self._options.watch_seconds):
            started = started or loaded(target, self._options.watch_timeout)
            if not started:
                continue
            try:
                live(target, self._options.watch_timeout)
                failures = 0
            except ProbeFailed as failure:
                failures += 1
                self._say(f"not alive ({failures} of {FAILURES_TO_END}): {failure}", "error")
            if failures == FAILURES_TO_END:
                self._sick = True
                self._stop.set()

    def _start(self, work_dir: Path) -> "subprocess.Popen[str]":
        options = self._options
        found = installation.find(work_dir, os.environ)
        command = command_line(
            found.executable,
            options.repository.resolve(),
            options.address,
            shm_prefix=self._shm_prefix,
            admin_key=secrets.token_hex(),
            backend_directory=found.backend_directory,
            extra_args=arguments(options),
        )
        process, report = keeper.spawn(
            without_model_control(command),
            shm_prefix=self._shm_prefix,
            work_dir=work_dir,
            grace=options.exit_seconds + KILL_AFTER_SECONDS,
            output=subprocess.PIPE,
            environment={**ENVIRONMENT, **os.environ, **found.environment},
        )
        with report:
            report.read()  # tritonserver's process id; the keeper waits for a reader
        return process

    def _say(self, message: str, level: str = "info") -> None:
        logs.write(logs.event("entrypoint", message, level), sys.stdout)
