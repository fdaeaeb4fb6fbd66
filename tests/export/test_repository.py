"""The configs as written, and folders that appear complete or not at all."""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from tritonclient.grpc import model_config_pb2

from export.accelerator import Accelerator
from export.architecture import Architecture
from export.encoder import FEATURES, MAX_BATCH
from export.repository import (
    DECODER,
    ENCODER,
    ENSEMBLE,
    ENSEMBLES,
    MODELS,
    TEMPLATES,
    OutputError,
    adapt_config,
    check_output,
    copy_sources,
    new_repository,
    read_config,
)
from tests.conftest import ROOT
from tests.export import tiny

GPU = model_config_pb2.ModelInstanceGroup.KIND_GPU


def _text(model: str) -> str:
    return (TEMPLATES / model / "config.pbtxt").read_text()


@pytest.mark.parametrize("model", MODELS)
def test_the_configs_as_written_are_for_the_published_model(model: str) -> None:
    assert adapt_config(_text(model), Architecture(), torch.float32) == _text(model)


@pytest.mark.parametrize("model", MODELS)
def test_every_config_is_well_formed(model: str) -> None:
    config = read_config(TEMPLATES, model)
    assert config.name == model
    assert bool(config.backend) != bool(config.platform)
    assert not config.response_cache.enable
    assert len({t.name for t in config.input}) == len(config.input)


def test_kept_images_live_in_one_process() -> None:
    assert [group.count for group in read_config(TEMPLATES, DECODER).instance_group] == [1]


@pytest.mark.parametrize("model", [ENCODER, ENSEMBLE])
def test_batch_sizes_match_the_graphs(model: str) -> None:
    assert read_config(TEMPLATES, model).max_batch_size == MAX_BATCH


def test_ensembles_have_no_code() -> None:
    for name in ENSEMBLES:
        config = read_config(TEMPLATES, name)
        assert {step.model_name for step in config.ensemble_scheduling.step} <= set(MODELS)
        assert not (TEMPLATES / name / "1" / "model.py").exists()


def _dims(text: str) -> list[list[int]]:
    return [[int(n) for n in re.findall(r"-?\d+", d)] for d in re.findall(r"dims: \[(.*?)\]", text)]


def test_another_image_size_changes_only_sizes() -> None:
    small = Architecture(image_size=224, d_model=128)
    expected = {1008: 224, 72: 16, 144: 32, 288: 64, 256: 128, 64: 32, 32: 16}
    for model in (ENCODER, DECODER, ENSEMBLE):
        text = adapt_config(_text(model), small, torch.float32)
        for ours, theirs in zip(_dims(text), _dims(_text(model)), strict=True):
            assert ours == [expected.get(size, size) for size in theirs]
        rest = [re.sub(r"dims: \[.*?\]", "", t) for t in (text, _text(model))]
        assert rest[0] == rest[1]


def test_half_precision_changes_only_the_embeddings_type() -> None:
    for model in (ENCODER, DECODER, ENSEMBLE):
        before, after = _text(model), adapt_config(_text(model), Architecture(), torch.float16)
        changed = [
            (a, b) for a, b in zip(before.splitlines(), after.splitlines(), strict=True) if a != b
        ]
        assert len(changed) == (0 if model == ENSEMBLE else len(FEATURES))
        assert all(a.replace("FP32", "FP16") == b for a, b in changed)


def test_the_built_configs_have_the_embeddings_type(exported_fp16: tiny.Export) -> None:
    for model, tensors in (
        (ENCODER, read_config(exported_fp16.repository, ENCODER).output),
        (DECODER, read_config(exported_fp16.repository, DECODER).input),
    ):
        types = {t.name: t.data_type for t in tensors if t.name in FEATURES}
        assert len(types) == len(FEATURES), model
        assert set(types.values()) == {model_config_pb2.TYPE_FP16}


@pytest.mark.parametrize("accelerator", Accelerator)
def test_an_accelerator_changes_only_encoder_and_decoder(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    copy_sources(tmp_path, Architecture(), torch.float32, accelerator)
    cpu = accelerator is Accelerator.CPU
    kind = model_config_pb2.ModelInstanceGroup.KIND_CPU if cpu else GPU
    for model in MODELS:
        config, written = read_config(tmp_path, model), read_config(TEMPLATES, model)
        if model in (ENCODER, DECODER):
            assert [(group.count, group.kind) for group in config.instance_group] == [(1, kind)]
            del config.instance_group[:], written.instance_group[:]
        if model == ENCODER:
            chosen = config.optimization.execution_accelerators.gpu_execution_accelerator
            assert [one.name for one in chosen] == ["tensorrt"] * (accelerator == "tensorrt")
            config.ClearField("optimization")
        assert config == written


def test_tensorrt_compiles_once_for_every_batch(tmp_path: Path) -> None:
    copy_sources(tmp_path, Architecture(image_size=224), torch.float16, Accelerator.TENSORRT)
    config = read_config(tmp_path, ENCODER)
    (chosen,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    sides = {bound: chosen.parameters[f"trt_profile_{bound}_shapes"] for bound in ("min", "max")}
    assert sides == {"min": "image:1x224x224x3", "max": f"image:{config.max_batch_size}x224x224x3"}
    assert chosen.parameters["trt_engine_cache_enable"] == "1"
    chart = (ROOT / "docker/helm/triton-sam3/templates/deployment.yaml").read_text()
    (volume,) = re.findall(r"name: engine-cache, mountPath: (\S+)}", chart)
    assert Path(chosen.parameters["trt_engine_cache_path"]).is_relative_to(volume)


def test_sources_are_copied_without_leftovers(tmp_path: Path) -> None:
    copy_sources(tmp_path, Architecture(), torch.float32)
    assert {folder.name for folder in tmp_path.iterdir()} == set(MODELS)
    written = {p.name for p in (TEMPLATES / DECODER / "1").glob("*.py")}
    assert {p.name for p in (tmp_path / DECODER / "1").iterdir()} == written
    for model in MODELS:
        assert (tmp_path / model / "1").is_dir()
        assert not list((tmp_path / model).rglob("__pycache__"))
        assert not list((tmp_path / model).rglob(".*"))


def _fill(folder: Path, marker: str = "new") -> None:
    (folder / ENCODER).mkdir(parents=True)
    (folder / ENCODER / marker).touch()


def test_a_repository_appears_when_it_is_complete(tmp_path: Path) -> None:
    output = tmp_path / "a" / "b" / "models"
    with new_repository(output, overwrite=False) as folder:
        _fill(folder)
        assert not output.exists()
    assert [p.name for p in output.iterdir()] == [ENCODER]
    assert [p.name for p in output.parent.iterdir()] == ["models"]
    (tmp_path / "plain").mkdir()
    assert output.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), new_repository(tmp_path / "a" / "models", overwrite=False) as folder:
        _fill(folder)
        raise error
    assert not list(tmp_path.iterdir())


def test_overwriting_replaces_the_whole_repository(tmp_path: Path) -> None:
    output = tmp_path / "models"
    _fill(output, "old")
    with new_repository(output, overwrite=True) as folder:
        _fill(folder)
        assert (output / ENCODER / "old").exists()
    assert [p.name for p in (output / ENCODER).iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["models"]


def test_a_failure_keeps_the_old_repository(tmp_path: Path) -> None:
    output = tmp_path / "models"
    _fill(output, "old")
    with pytest.raises(ValueError), new_repository(output, overwrite=True) as folder:
        _fill(folder)
        raise ValueError
    assert [p.name for p in (output / ENCODER).iterdir()] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["models"]


def test_a_failed_replacement_restores_the_old_repository(tmp_path: Path) -> None:
    output = tmp_path / "models"
    _fill(output, "old")
    with pytest.raises(OutputError), new_repository(output, overwrite=True) as folder:
        folder.rmdir()
    assert [p.name for p in (output / ENCODER).iterdir()] == ["old"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_what_appears_during_the_export_is_kept(tmp_path: Path, overwrite: bool) -> None:
    output = tmp_path / "models"
    with (
        pytest.raises(OutputError, match=r"refusing to replace .*: it contains precious\.txt"),
        new_repository(output, overwrite=overwrite) as folder,
    ):
        _fill(folder)
        output.mkdir()
        (output / "precious.txt").touch()
    assert [p.name for p in output.iterdir()] == ["precious.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["models"]


@pytest.mark.parametrize("interrupted", ["old", "new"])
def test_an_interruption_right_after_a_rename_leaves_a_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: str
) -> None:
    output = tmp_path / "models"
    _fill(output, "old")
    rename = Path.rename

    def rename_and_interrupt(path: Path, target: Path) -> Path:
        marker = "old" if (path / ENCODER / "old").exists() else "new"
        renamed = rename(path, target)
        if marker == interrupted:
            monkeypatch.setattr(Path, "rename", rename)
            raise KeyboardInterrupt
        return renamed

    monkeypatch.setattr(Path, "rename", rename_and_interrupt)
    with pytest.raises(KeyboardInterrupt), new_repository(output, overwrite=True) as folder:
        _fill(folder)
    assert [p.name for p in (output / ENCODER).iterdir()] == [interrupted]
    assert [p.name for p in tmp_path.iterdir()] == ["models"]


def test_a_link_to_a_folder_of_another_file_system_is_followed(tmp_path: Path) -> None:
    with TemporaryDirectory(dir="/dev/shm") as target:
        link = tmp_path / "models"
        link.symlink_to(target)
        check_output(link, overwrite=False)


def test_a_link_to_a_mount_point_is_rejected(tmp_path: Path) -> None:
    link = tmp_path / "models"
    link.symlink_to("/dev/shm")
    with pytest.raises(OutputError, match="models is a mount point"):
        check_output(link, overwrite=False)


def test_a_symbolic_link_is_followed_and_not_replaced(tmp_path: Path) -> None:
    target, link = tmp_path / "volume", tmp_path / "models"
    target.mkdir()
    link.symlink_to(target)
    with new_repository(link, overwrite=True) as folder:
        _fill(folder)
    assert link.is_symlink()
    assert (target / ENCODER / "new").exists()


def test_what_is_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file; give a folder"):
        check_output(tmp_path / "file", overwrite=True)
    with pytest.raises(
        OutputError, match=r"refusing to replace .*: it contains file, which is not part"
    ):
        check_output(tmp_path, overwrite=True)
    _fill(tmp_path / "models")
    with pytest.raises(OutputError, match="pass --overwrite to replace it"):
        check_output(tmp_path / "models", overwrite=False)
    check_output(tmp_path / "models", overwrite=True)
    check_output(tmp_path / "other", overwrite=False)


@pytest.mark.parametrize("parent", ["file", "/proc"])
def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, parent: str) -> None:
    (tmp_path / "file").touch()
    output = tmp_path / parent / "models"
    with (
        pytest.raises(OutputError, match=f"^{output} cannot be written: \\w+"),
        new_repository(output, overwrite=False),
    ):
        pass


def test_an_impossible_name_of_a_folder_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be accessed: File name too long"):
        check_output(tmp_path / ("x" * 300), overwrite=False)


def test_a_full_disk_is_an_output_error(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="models cannot be written: No space left on device"),
        new_repository(tmp_path / "models", overwrite=False),
    ):
        Path("/dev/full").write_bytes(b"x")
    assert not list(tmp_path.iterdir())
