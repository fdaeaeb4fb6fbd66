"""The README's commands and code, run as written; a command nobody runs fails here."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import cv2
import pytest
import skimage.data
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from benchmarks import perf_analyzer
from server import TritonServer
from tests.client.test_shared_memory import regions
from tests.conftest import DEMO_CHECKPOINT, ROOT
from tests.server.tiny import wait_for

README = (ROOT / "README.md").read_text()
TOOLS = Path(sys.executable).parent


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = "".join(blocks("bash")).splitlines()
    return [line for raw in lines if (line := raw.split("  #")[0].strip())]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: TritonServer) -> Iterator[Path]:
    """A folder with what a reader would have: a photo and a checkpoint."""
    photo = cv2.cvtColor(skimage.data.coffee(), cv2.COLOR_RGB2BGR)
    cv2.imwrite(str(tmp_path / "photo.jpg"), photo)
    (tmp_path / "sam3.pt").symlink_to(DEMO_CHECKPOINT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TRITON_SAM3_URL", server.grpc_url)
    monkeypatch.setenv("TRITON_SAM3_HTTP_URL", server.http_url)
    yield tmp_path
    assert wait_for(partial(gives_up_regions, server), seconds=10)


def gives_up_regions(server: TritonServer) -> bool:
    """perf_analyzer has left some to a busy server once; other tests count them."""
    with (
        tritonclient.grpc.InferenceServerClient(server.grpc_url.split("//")[1]) as client,
        suppress(InferenceServerException),  # in use until its request ends
    ):
        client.unregister_system_shared_memory()
    return not regions(server)


def test_client_code_runs_as_written(desk: Path, server: TritonServer) -> None:
    (code,) = blocks("python")
    names: dict[str, object] = {}
    exec(code.replace("grpc://127.0.0.1:8001", server.grpc_url), names)
    assert len(names["result"]) == 2  # type: ignore[arg-type]
    assert (desk / "photo.png").is_file()


def test_every_command_is_run(desk: Path) -> None:
    """In the README's order: the server serves what the export built."""
    for command in commands():
        runner = next((run for start, run in RUNNERS.items() if command.startswith(start)), None)
        assert runner is not None, f"nothing runs the README's command: {command}"
        runner(shlex.split(command))


def test_curl_runs_as_written(desk: Path, server: TritonServer) -> None:
    (script,) = blocks("sh")
    command = ["sh", "-c", script.replace("http://127.0.0.1:8000", server.http_url)]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    (masks,) = [output for output in answer["outputs"] if output["name"] == "masks"]
    height, width = skimage.data.coffee().shape[:2]
    assert [json.loads(mask)["size"] for mask in masks["data"]] == [[height, width]]


MEASURING = ("bench", "perf")
"""What takes its time; its parts are tested in tests/benchmarks."""


def make(words: list[str]) -> None:
    """make demo and make test are CI's own steps: see that it has them, and make knows them."""
    assert words[1] in MEASURING or f"make {words[1]}\n" in (ROOT / ".ci" / "run").read_text()
    subprocess.run([*words, "--dry-run"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def once(words: list[str]) -> None:
    subprocess.run([TOOLS / Path(words[0]).name, *_here(words[1:])], check=True)


def analyze(words: list[str]) -> None:
    """In short windows: whether the words are right shows in the first one."""
    try:
        analyzer = perf_analyzer.find()
    except perf_analyzer.PerfAnalyzerError as error:
        pytest.skip(f"no perf_analyzer: {error}")
    few = ["-p", "500", "-s", "999"]  # however steady; the machine may be busy
    assert "Request concurrency: 1" in analyzer.run([*_here(words[1:]), *few])


def _here(words: list[str]) -> list[str]:
    """The server's default addresses replaced by those of the one that runs."""
    grpc, http = (os.environ[name] for name in ("TRITON_SAM3_URL", "TRITON_SAM3_HTTP_URL"))
    addresses = {"127.0.0.1:8001": grpc.split("//")[1], "127.0.0.1:8000": http.split("//")[1]}
    for written, real in addresses.items():
        words = [word.replace(written, real) for word in words]
    return words


def serve(words: list[str]) -> None:
    """Until it prints its addresses; free ports, since the default ones may be taken."""
    free = ["--http-port=0", "--grpc-port=0", "--metrics-port=0"]
    command = [str(TOOLS / Path(words[0]).name), *words[1:], *free]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    ) as process:
        assert process.stdout is not None
        try:
            urls = process.stdout.readline()
        finally:
            process.send_signal(signal.SIGINT)
    assert "http://127.0.0.1:" in urls
    assert "grpc://127.0.0.1:" in urls
    assert process.returncode == 0


RUNNERS: dict[str, Callable[[list[str]], None]] = {
    "make ": make,
    ".venv/bin/python -m export ": once,
    ".venv/bin/python -m server ": serve,
    ".venv/bin/python -m benchmarks.perf_inputs ": once,
    "perf_analyzer ": analyze,
    ".venv/bin/triton-sam3 ": once,
}
