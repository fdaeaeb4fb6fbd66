"""`python -m export` as its user meets it: a table, one sentence, an exit status."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import skimage.data
import torch
from typer.testing import Result

from export import __main__ as program
from export import check, checkpoint, pipeline
from export.accelerator import Accelerator
from export.check import PHOTOS, PROMPTS
from export.interruption import unwind
from export.repository import DECODER, ENCODER, MODELS
from tests.conftest import DEMO_CHECKPOINT
from tests.export import tiny


def _sentence(result: Result) -> str:
    """The one line that says why an export failed; there must be nothing else but its progress."""
    assert "Traceback" not in result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.stderr.rstrip().endswith(line)
    return line.removeprefix("error: ")


def _refused(checkpoint: Path, output: Path, *options: object) -> str:
    result = tiny.run("--checkpoint", checkpoint, "--output", output, *options)
    assert result.exit_code == 2
    assert not result.stdout
    return _sentence(result)


def test_an_export_prints_what_it_measured_and_what_to_do_next(exported: tiny.Export) -> None:
    assert exported.exit_code == 0
    said = exported.stdout
    for prompt in PROMPTS:
        assert re.search(rf"{prompt.name}: mask IoU\W+1\.00000\W+≥ 0\.995\W+ok", said)
        assert re.search(rf"{prompt.name}: logits' relative error\W+\d\.\de-\d+\W+≤ 0\.001", said)
    assert "FAILED" not in said
    assert "fp32, in FP32: everything" in said
    assert said.rstrip().endswith(f"next: python -m server {exported.repository}")
    for step in ("loading", "encoder", "decoder", "checking"):
        assert step in exported.stderr


def test_names_of_folders_are_printed_as_they_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(program, "export_repository", lambda *_, **__: [])
    result = tiny.run("--checkpoint", tmp_path / "sam3.pt", "--output", "a [/b]")
    assert result.exit_code == 0
    assert "\na [/b]: fp32" in f"\n{result.stdout}"
    assert result.stdout.endswith("next: python -m server 'a [/b]'\n")


def test_an_export_replaces_the_whole_old_repository(exported: tiny.Export) -> None:
    repository = exported.repository
    assert sorted(p.name for p in repository.iterdir()) == sorted(MODELS)
    assert not list(repository.rglob("old"))
    assert (repository / ENCODER / "1" / "model.onnx").is_file()
    assert (repository / DECODER / "1" / "decoder.pt2").is_file()
    assert sorted(p.name for p in repository.parent.iterdir() if p.name.startswith(".")) == []


def test_half_precision_passes_its_gate_and_prints_what_stays_fp32(
    exported_fp16: tiny.Export,
) -> None:
    assert exported_fp16.exit_code == 0
    said = exported_fp16.stdout
    ious = [float(value) for value in re.findall(r"mask IoU\W+([\d.]+)", said)]
    assert len(ious) == len(PROMPTS)
    assert min(ious) >= 0.995
    assert "relative error" not in said
    kept = "at least the patch projection, sums in layer norms and the decoder"
    assert f"fp16, in FP32: {kept}" in said
    assert re.search(r"largest value in FP16\W+\S+\W+≤ 32768\W+ok", said)


def test_the_demo_passes_the_gate_of_half_precision(tmp_path: Path) -> None:
    """Trained weights, unlike the tiny model's: their attention is sharp, where FP16 hurts."""
    output = tmp_path / "models"
    result = tiny.run("--checkpoint", DEMO_CHECKPOINT, "--output", output, "--precision", "fp16")
    assert result.exit_code == 0, result.stdout
    assert (output / ENCODER / "1" / "model.onnx").is_file()


def _write_copy(repository: Path) -> Callable[..., Path]:
    """Copy a repository instead of writing one, which takes longer."""

    def write(folder: Path, *_: object) -> Path:
        shutil.copytree(repository, folder, dirs_exist_ok=True)
        return folder / DECODER / "1" / "decoder.pt2"

    return write


def test_out_of_tolerance_exits_with_1_and_keeps_the_old_repository(
    exported: tiny.Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "models"
    (output / ENCODER / "old").mkdir(parents=True)
    monkeypatch.setattr(pipeline, "write_repository", _write_copy(exported.repository))
    result = tiny.run(
        *("--checkpoint", exported.checkpoint, "--output", output),
        *("--min-iou", 1.1, "--overwrite"),
    )
    assert result.exit_code == 1
    assert result.stdout.count("FAILED") == len(PROMPTS)
    sentence = _sentence(result)
    assert sentence.startswith("out of tolerance: point: mask IoU, ")
    assert sentence.endswith(f"{output} was not written")
    assert [p.name for p in output.rglob("*")] == [ENCODER, "old"]
    assert list(tmp_path.iterdir()) == [output]


def _missing(folder: Path) -> Path:
    return folder / "sam3.pt"


def _text(folder: Path) -> Path:
    (folder / "sam3.pt").write_text("not a checkpoint")
    return folder / "sam3.pt"


def _hugging_face(folder: Path) -> Path:
    torch.save({"detector_model.a": torch.zeros(1)}, folder / "sam3.pt")
    return folder / "sam3.pt"


def _incomplete(folder: Path) -> Path:
    tiny.save(folder / "sam3.pt")
    weights = torch.load(folder / "sam3.pt")
    del weights["model"]["tracker.sam_mask_decoder.iou_token.weight"]
    torch.save(weights, folder / "sam3.pt")
    return folder / "sam3.pt"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_missing, "no such file"),
        (_text, "not a PyTorch checkpoint"),
        (_hugging_face, "looks like Hugging Face's conversion"),
        (_incomplete, "lacks tracker.sam_mask_decoder.iou_token.weight"),
    ],
)
def test_a_bad_checkpoint_exits_with_2_and_writes_nothing(
    tmp_path: Path, make: Callable[[Path], Path], says: str
) -> None:
    checkpoint = make(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert says in _refused(checkpoint, tmp_path / "a" / "models")
    assert sorted(tmp_path.iterdir()) == before


def test_a_bad_image_size_exits_with_2(tiny_checkpoint: Path, tmp_path: Path) -> None:
    sentence = _refused(tiny_checkpoint, tmp_path / "models", "--image-size", 100)
    assert sentence.startswith("image size 100 is not a positive multiple of the patch size 14")
    assert not list(tmp_path.iterdir())


def test_an_output_in_the_way_exits_with_2_before_anything_is_read(tmp_path: Path) -> None:
    nothing = tmp_path / "sam3.pt"
    (tmp_path / "file").touch()
    assert "file is a file" in _refused(nothing, tmp_path / "file", "--overwrite")
    assert f"refusing to replace {tmp_path}: it contains file" in _refused(
        nothing, tmp_path, "--overwrite"
    )
    (tmp_path / "models" / ENCODER).mkdir(parents=True)
    assert "already holds a model repository" in _refused(nothing, tmp_path / "models")
    mounted = "/dev/shm is a mount point, which cannot be replaced as a whole; give a folder in it"
    assert mounted in _refused(nothing, Path("/dev/shm"), "--overwrite")


def test_an_output_that_cannot_be_written_exits_with_2(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "models"
    assert f"{output} cannot be written: " in _refused(tiny_checkpoint, output)


def _command(checkpoint: Path, output: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "export",
        "--checkpoint",
        str(checkpoint),
        "--output",
        str(output),
    ]


def test_the_command_exits_with_a_status_and_a_sentence(tmp_path: Path) -> None:
    command = _command(tmp_path / "sam3.pt", tmp_path / "models")
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert not ended.stdout
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {tmp_path}/sam3.pt: no such file")
    assert "Traceback" not in ended.stderr


def test_a_missing_module_is_named(tmp_path: Path) -> None:
    """As with a torch that lacks it: sam3 imports it."""
    (tmp_path / "triton.py").write_text("raise ModuleNotFoundError('no', name='triton')")
    command = _command(tmp_path / "sam3.pt", tmp_path / "models")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: the module triton is missing: pip install")
    assert "Traceback" not in ended.stderr


def test_an_interrupted_export_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "models"
    with subprocess.Popen(
        _command(tiny_checkpoint, output), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        while not list(tmp_path.glob(f".models.*/new/{ENCODER}")):  # until it is half done
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode not in (0, 2)
    assert not list(tmp_path.iterdir())
    assert "Traceback" not in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_end_an_export_like_ctrl_c(tmp_path: Path, number: signal.Signals) -> None:
    _refused(tmp_path / "sam3.pt", tmp_path / "models")
    assert signal.getsignal(number) is unwind


def test_a_sighup_ignored_by_nohup_does_not_end_an_export(tmp_path: Path) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _refused(tmp_path / "sam3.pt", tmp_path / "models")
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_an_unreadable_photo_exits_with_2_and_writes_nothing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable() -> None:
        raise PermissionError(13, "Permission denied", "coffee.png")

    monkeypatch.setattr(skimage.data, "coffee", unreadable)
    sentence = _refused(tiny_checkpoint, tmp_path / "models")
    assert sentence.startswith("scikit-image's photo coffee, with which an export is checked, ")
    assert "cannot be read: Permission denied; reinstall scikit-image" in sentence
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """A limit on file sizes simulates a full disk: the weights do not fit."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        sentence = _refused(tiny_checkpoint, tmp_path / "models")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sentence.startswith(f"{tmp_path}/models cannot be written: File too large; it is built")
    assert not list(tmp_path.iterdir())


def test_half_precision_is_checked_on_every_photo(
    exported: tiny.Export, exported_fp16: tiny.Export
) -> None:
    for export, photos in ((exported, PHOTOS[:1]), (exported_fp16, PHOTOS)):
        checked = re.findall(r"checking against PyTorch: (\w+)", export.stderr)
        assert tuple(dict.fromkeys(checked)) == photos


@pytest.mark.parametrize("accelerator", [None, *Accelerator])
def test_only_tensorrt_gets_a_graph_of_plain_operators(
    accelerator: Accelerator | None,
    exported: tiny.Export,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fused: list[bool] = []
    model: Any = SimpleNamespace(architecture=checkpoint.load(exported.checkpoint).architecture)
    monkeypatch.setattr(pipeline, "ImageEncoder", lambda *_, **given: fused.append(given["fused"]))
    for slow in ("export_encoder", "export_decoder", "save_decoder"):
        monkeypatch.setattr(pipeline, slow, lambda *_: None)
    pipeline.write_repository(tmp_path, model, torch.float16, accelerator)
    assert fused == [accelerator is not Accelerator.TENSORRT]


def test_an_export_is_checked_against_its_configs(
    exported: tiny.Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks: list[object] = []

    def check_values(*_: object, fused: bool = True, **__: object) -> list[check.Check]:
        checks.append(fused)
        return []

    monkeypatch.setattr(pipeline, "write_repository", _write_copy(exported.repository))
    monkeypatch.setattr(pipeline, "check_signatures", lambda *_: checks.append("signatures"))
    monkeypatch.setattr(check, "check_values", check_values)
    monkeypatch.setattr(torch.export, "load", lambda _: None)
    for accelerator in (Accelerator.TENSORRT, Accelerator.CUDA):
        output = tmp_path / accelerator.value
        pipeline.export_repository(exported.checkpoint, output, accelerator=accelerator)
    assert checks == ["signatures", False, "signatures", True]
