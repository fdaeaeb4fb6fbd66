"""Faults of the server's own processes."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import suppress

import psutil

from benchmarks.faults.bench import Bench
from benchmarks.faults.stand import Stand
from benchmarks.faults.trial import Result, Trial
from triton_sam3.contract import DECODER, ENCODER

SLOW_SECONDS = 10.0


def killed(model: str, bench: Bench, title: str) -> Result:
    """Send SIGKILL to a model's process. Triton 2.51 carries on without it; the watch does not."""
    stand = bench.stand()
    if model == ENCODER and not stand.container.stubs(model):
        return Result(title, skipped="here, the encoder runs in tritonserver's own process")
    with Trial(title, stand, bench.questions(stand)) as trial:
        trial.inject(lambda: _signal(stand, model, signal.SIGKILL))
        trial.recover()
    return trial.result()


def server_killed(bench: Bench, title: str) -> Result:
    """Send SIGKILL to tritonserver."""
    stand = bench.stand()
    with Trial(title, stand, bench.questions(stand)) as trial:
        trial.inject(lambda: stand.container.triton().kill())
        trial.recover()
    return trial.result()


def stuck(bench: Bench, title: str) -> Result:
    """Stop the decoder's process with SIGSTOP; it never continues."""
    stand = bench.stand()
    with Trial(title, stand, bench.questions(stand), timeout=5.0) as trial:
        trial.inject(lambda: _signal(stand, DECODER, signal.SIGSTOP))
        trial.recover(within=90.0)
    return trial.result()


def slow(bench: Bench, title: str) -> Result:
    """Let the decoder's process run a fifth of the time. This must not trigger a restart."""
    stand = bench.stand()
    with Trial(title, stand, bench.questions(stand), timeout=20.0) as trial:
        over = threading.Event()
        _signal(stand, DECODER, signal.SIGCONT)  # there is one
        doing = threading.Thread(target=_slow_down, args=(stand, over))
        trial.inject(doing.start)
        try:
            time.sleep(SLOW_SECONDS)
        finally:
            over.set()
            doing.join()
            trial.cleared()
        trial.recover()
    return trial.result()


def _slow_down(stand: Stand, over: threading.Event) -> None:
    while not over.wait(0.05):
        with suppress(LookupError):  # while it is restarted
            _signal(stand, DECODER, signal.SIGSTOP)
            over.wait(0.2)
            _signal(stand, DECODER, signal.SIGCONT)


def _signal(stand: Stand, model: str, number: int) -> None:
    stubs = stand.container.stubs(model)
    if not stubs:
        raise LookupError(f"there is no process of {model}: the fault was not injected")
    for stub in stubs:
        with suppress(psutil.NoSuchProcess):
            stub.send_signal(number)
