"""The commands and code of the README and of "Measure it" in docs/operations.md, run as written.

A command without a runner fails here.
"""

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
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
MEASURE = OPERATIONS.partition("### Measure it\n")[2].partition("\n## ")[0]
TOOLS = Path(sys.executable).parent


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = "".join(blocks("bash") + blocks("bash", MEASURE)).splitlines()
    return [line for raw in lines if (line := raw.split("  #")[0].strip())]


@pytest.fixture
def reader_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: TritonServer
) -> Iterator[Path]:
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
    """perf_analyzer once left some on a busy server; other tests count them."""
    with (
        tritonclient.grpc.InferenceServerClient(server.grpc_url.split("//")[1]) as client,
        suppress(InferenceServerException),  # in use until its request ends
    ):
        client.unregister_system_shared_memory()
    return not regions(server)


def test_client_code_runs_as_written(reader_folder: Path, server: TritonServer) -> None:
    (code,) = blocks("python")
    names: dict[str, object] = {}
    exec(code.replace("grpc://127.0.0.1:8001", server.grpc_url), names)
    assert len(names["result"]) == 2  # type: ignore[arg-type]
    assert (reader_folder / "photo.png").is_file()


def test_every_command_is_run(reader_folder: Path) -> None:
    """In the documents' order: the server serves what the export built."""
    unused = set(RUNNERS)
    for command in commands():
        start = next((start for start in RUNNERS if command.startswith(start)), None)
        assert start is not None, f"nothing runs the documented command: {command}"
        unused.discard(start)
        RUNNERS[start](shlex.split(command))
    assert not unused


def test_curl_runs_as_written(reader_folder: Path, server: TritonServer) -> None:
    (script,) = blocks("sh")
    command = ["sh", "-c", script.replace("http://127.0.0.1:8000", server.http_url)]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    (masks,) = [output for output in answer["outputs"] if output["name"] == "masks"]
    height, width = skimage.data.coffee().shape[:2]
    assert [json.loads(mask)["size"] for mask in masks["data"]] == [[height, width]]


MEASURING = ("bench", "perf")
"""These take long; their parts are tested in tests/benchmarks."""


def make(words: list[str]) -> None:
    """CI itself runs make demo and make test: check that it does, and that make knows them."""
    assert words[1] in MEASURING or f"make {words[1]}\n" in (ROOT / ".ci" / "run").read_text()
    subprocess.run([*words, "--dry-run"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def once(words: list[str]) -> None:
    subprocess.run([TOOLS / Path(words[0]).name, *_here(words[1:])], check=True)


def analyze(words: list[str]) -> None:
    """Run it in short windows: the first one shows whether the arguments are right."""
    try:
        analyzer = perf_analyzer.find()
    except perf_analyzer.PerfAnalyzerError as error:
        pytest.skip(f"no perf_analyzer: {error}")
    few = ["-p", "500", "-s", "999"]  # however unstable: the machine may be busy
    assert "Request concurrency: 1" in analyzer.run([*_here(words[1:]), *few])


def _here(words: list[str]) -> list[str]:
    """Replace the default addresses with those of the running server."""
    grpc, http = (os.environ[name] for name in ("TRITON_SAM3_URL", "TRITON_SAM3_HTTP_URL"))
    addresses = {"127.0.0.1:8001": grpc.split("//")[1], "127.0.0.1:8000": http.split("//")[1]}
    for written, real in addresses.items():
        words = [word.replace(written, real) for word in words]
    return words


def serve(words: list[str]) -> None:
    """Run it until it prints its addresses; on free ports, since the defaults may be taken."""
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
