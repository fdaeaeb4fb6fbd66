"""The first signal unwinds a command, and later ones do not disturb its clean-up."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from export.interruption import ENDING
from tests.conftest import ROOT

COMMAND = """
import signal, sys
from export.interruption import unwind_on_signals

if "ignored" in sys.argv:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
unwind_on_signals()
try:
    print("ready", flush=True)
    sys.stdin.readline()
    print("undisturbed", flush=True)
finally:
    print("cleaning up", flush=True)
    sys.stdin.readline()
    print("clean", flush=True)
"""


def _process(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("first", ENDING)
def test_only_the_first_signal_interrupts(first: signal.Signals) -> None:
    with _process() as process:
        assert _said(process) == "ready"
        process.send_signal(first)
        assert _said(process) == "cleaning up"
        for number in ENDING:
            process.send_signal(number)
        rest, errors = process.communicate("\n", timeout=60)
    assert rest.strip() == "clean"
    assert errors.strip().endswith("KeyboardInterrupt")


def test_what_was_ignored_stays_ignored() -> None:
    with _process("ignored") as process:
        assert _said(process) == "ready"
        process.send_signal(signal.SIGHUP)
        rest, _ = process.communicate("\n\n", timeout=60)
    assert rest.split("\n")[:2] == ["undisturbed", "cleaning up"]
    assert process.returncode == 0
