"""`python -m demo` as a newcomer runs it: to completion, and interrupted at every stage."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread

import cv2
import psutil
import pytest
import torch
from tritonclient.grpc import model_config_pb2

from demo import __main__ as program
from demo.__main__ import OUTPUT
from export import pipeline
from export.repository import DECODER, read_config
from export.signatures import SignatureError
from server.keeper import SHARED_MEMORY
from tests.conftest import ROOT

PICTURES = ("clicks", "boxes", "coins", "coin-boxes", "coffee")
EXPORTED = """
import shutil, sys
import demo.__main__ as program
exported = sys.argv.pop()
program._export = lambda models: shutil.copytree(exported, models)
sys.exit(program.main())
"""
"""The program with a copy instead of its export; with a link, its server would not be found."""


@contextmanager
def demo(
    folder: Path, exported: Path | None = None
) -> Iterator[tuple[subprocess.Popen[str], set[str]]]:
    """Run the program in its own folder; it must leave no process and no shared memory behind.

    Also yields the prefixes of its servers' shared memory as they are seen. If `exported` is given,
    the program serves a copy of it instead of exporting.
    """
    prefixes: set[str] = set()
    program = ["-m", "demo"] if exported is None else ["-c", EXPORTED, str(exported)]
    with subprocess.Popen(
        [sys.executable, *program],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        watch = Thread(target=_note_prefixes, args=(process, prefixes))
        watch.start()
        try:
            yield process, prefixes
        finally:
            process.kill()
            watch.join()
    models = str(folder / OUTPUT / "models")
    mine = [p for p in psutil.process_iter(["cmdline"]) if models in str(p.info["cmdline"])]
    assert mine == []
    assert [region for prefix in prefixes for region in SHARED_MEMORY.glob(f"{prefix}*")] == []


def _note_prefixes(process: subprocess.Popen[str], prefixes: set[str]) -> None:
    """Collect the shared memory prefixes of the program's servers; others come and go too."""
    while process.poll() is None:
        with suppress(psutil.Error):
            for child in psutil.Process(process.pid).children(recursive=True):
                prefixes |= set(re.findall(r"--shm-prefix=(\S+)", " ".join(child.cmdline())))
        time.sleep(0.2)


def test_it_writes_pictures_and_prints_what_to_do_next(tmp_path: Path) -> None:
    with demo(tmp_path) as (process, prefixes):
        said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert prefixes  # otherwise the check for shared memory would be empty
    for name in PICTURES:
        picture = cv2.imread(str(tmp_path / OUTPUT / f"{name}.png"))
        assert picture is not None
        assert picture.std() > 10
    rows = re.findall(rf"({OUTPUT}/\S+)\.png\D+(\d+)\D+([\d.]+)\D+?([\d.]+|unknown)", said)
    assert [Path(row[0]).name for row in rows] == list(PICTURES)
    assert all(float(true) > 0.3 for *_, true in rows if true != "unknown")
    for step in ("exporting", "starting", "stopping"):
        assert re.search(rf"✓ {step}.*: [\d.]+ s", said)
    assert "python -m export --checkpoint sam3.pt" in said
    config = read_config(tmp_path / OUTPUT / "models", DECODER)
    kinds = {group.kind for group in config.instance_group}
    # Triton may see a GPU that torch does not.
    assert torch.cuda.is_available() or kinds == {model_config_pb2.ModelInstanceGroup.KIND_CPU}


def test_the_printed_commands_can_be_pasted_wherever_the_checkout_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", "/home/a b/.venv/bin/python")
    program._report([])
    commands = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert len(commands) == 4
    for command in commands:
        assert shlex.split(command)[0].startswith("/home/a b/.venv/bin/")


def _failure(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """The message of the program that fails in a folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["demo"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the tests have their own
    assert program.main() == 1
    (sentence,) = capsys.readouterr().out.splitlines()
    return sentence


def test_a_failed_export_is_reported_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / OUTPUT / "models").mkdir(parents=True)
    (tmp_path / OUTPUT / "models" / "mine").touch()
    said = _failure(tmp_path, monkeypatch, capsys)
    assert said.startswith(f"error: refusing to replace {OUTPUT}/models: it contains mine")


def test_a_damaged_checkpoint_is_reported_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "checkpoint.pt"
    damaged.write_bytes(program.CHECKPOINT.read_bytes()[:-1000])
    monkeypatch.setattr(program, "CHECKPOINT", damaged)
    said = _failure(tmp_path, monkeypatch, capsys)
    assert said.startswith(f"error: {damaged}: not a PyTorch checkpoint (damaged, incomplete")


def test_a_graph_that_does_not_fit_its_config_is_reported_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def disagree(*_: object, **__: object) -> None:
        raise SignatureError("the encoder's inputs disagree")

    monkeypatch.setattr(pipeline, "export_repository", disagree)
    said = _failure(tmp_path, monkeypatch, capsys)
    assert said == "error: the encoder's inputs disagree"


def test_help_starts_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "demo", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.check_output(command, cwd=tmp_path, env=environment, text=True)
    assert said.startswith("usage: python -m demo")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("after", ["", "✓ exporting", "http://"])
def test_ctrl_c_leaves_nothing(after: str, tmp_path: Path, repository: Path) -> None:
    """While it exports, while tritonserver loads, while it segments."""
    with demo(tmp_path, repository if after else None) as (process, prefixes):
        assert process.stdout is not None
        if after:
            for line in process.stdout:
                if after in line:
                    break
            else:
                pytest.fail(f"exited before {after!r}")
            while not prefixes:  # until its server has started
                assert process.poll() is None
                time.sleep(0.05)
        else:
            _wait_until_exporting(process.pid, tmp_path)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "nothing is left running" in said


def _wait_until_exporting(pid: int, folder: Path) -> None:
    """Wait for the first file of the new repository."""
    while not list(folder.glob(f"{OUTPUT}/**/*.pbtxt")):
        assert psutil.pid_exists(pid)
