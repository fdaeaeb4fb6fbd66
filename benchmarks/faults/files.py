"""Faults on disk: a damaged repository, a checkpoint of a different generation."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.artifacts import DEMO_CHECKPOINT
from benchmarks.environment import ROOT
from benchmarks.faults.bench import Bench
from benchmarks.faults.load import Kind
from benchmarks.faults.stand import Stand
from benchmarks.faults.trial import Result, Trial
from triton_sam3.contract import DECODER, ENCODER

ONNX = f"{ENCODER}/1/model.onnx"
PT2 = f"{DECODER}/1/decoder.pt2"
CONFIG = f"{DECODER}/config.pbtxt"
FAILED_STARTS = 2
HOLE_BYTES = 4096
MAX_SENTENCE = 240
NEW_NAMES = {
    "tracker.sam_": "tracker.model.interactive_sam_",
    ".sam2_convs.": ".interactive_convs.",
    "tracker.no_mem": "tracker.model.no_mem",
}
"""SAM 3's parameter names, and SAM 3.1's."""


def corrupted(file: str, bench: Bench, title: str) -> Result:
    """Zero the middle of a file, as a bad copy would, and restart; later repair it."""
    repository = bench.copy()
    path = repository / file
    whole = path.read_bytes()
    middle, hole = len(whole) // 2, min(HOLE_BYTES, len(whole) // 4)
    with Stand(repository, bench.folder()) as stand:

        def harm() -> None:
            path.write_bytes(whole[:middle] + bytes(hole) + whole[middle + hole :])
            stand.container.triton().kill()

        with Trial(title, stand, bench.questions(stand)) as trial:
            trial.inject(harm)
            _wait_for(lambda: len(stand.statuses) > FAILED_STARTS)
            refused, said = stand.statuses[1:], stand.refusal()
            path.write_bytes(whole)
            trial.cleared()
            trial.recover(within=120.0)
        named = Path(file).name in said or Path(file).parts[0] in said
        if not named or 0 in refused:
            raise RuntimeError(f"{title}: exit statuses {refused}, message {said!r}")
        trial.remark = f"{len(refused)} starts rejected before it was repaired: {sentence(said)}"
        return trial.result()


def _wait_for(condition: Callable[[], bool], within: float = 90.0) -> None:
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"timed out after {within:g} s")
        time.sleep(0.1)


def sentence(text: str) -> str:
    """Shorten a text for a table, and remove this run's folders."""
    flat = re.sub(r"/\S*/(?=sam3)", "", " ".join(text.split())).replace("|", "/")
    flat = re.sub(r"^\W+loading the checkpoint \S+ ", "", flat)
    return flat if len(flat) <= MAX_SENTENCE else flat[: MAX_SENTENCE - 1] + "…"


def wrong_generation(bench: Bench, title: str) -> Result:
    """The export must refuse the checkpoint: it may not write a repository."""
    folder = bench.folder()
    checkpoint, output = folder / "sam3.1.pt", folder / "models"
    weights = torch.load(DEMO_CHECKPOINT, map_location="cpu", weights_only=True)
    for old, new in NEW_NAMES.items():
        weights["model"] = {key.replace(old, new): v for key, v in weights["model"].items()}
    torch.save(weights, checkpoint)
    command = (sys.executable, "-m", "export", f"--checkpoint={checkpoint}", f"--output={output}")
    began = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    took = time.monotonic() - began
    clear = done.returncode == 2 and "SAM 3.1" in done.stderr and not output.exists()
    kind = Kind.CLEAR if clear else Kind.WRONG
    counts = {each: int(each is kind) for each in Kind}
    said = f"exit status {done.returncode} after {took:.0f} s: {sentence(done.stderr)}"
    return Result(title, counts, remark=said)
