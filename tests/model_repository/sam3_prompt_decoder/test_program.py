"""A program that cannot be used is rejected with what is wrong and what to do."""

from __future__ import annotations

import os
import tempfile
import zipfile
from pathlib import Path

import program as reader
import pytest
import torch
from program import TORCH_VERSION, ProgramError, bind, load_program
from torch import Tensor
from torch._guards import detect_fake_mode

from export import decoder as exporter
from tests.export import tiny

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


def refused(path: Path) -> str:
    with pytest.raises(ProgramError) as caught:
        load_program(path, CPU)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert str(path.parent) not in sentence
    return sentence


def test_exporter_and_server_agree_on_where_the_version_is() -> None:
    assert TORCH_VERSION == exporter.TORCH_VERSION


def test_a_missing_program(tmp_path: Path) -> None:
    assert refused(tmp_path / "decoder.pt2") == (
        "there is no decoder.pt2 in the model's version folder; build the model repository with: "
        "python -m export"
    )


@pytest.mark.parametrize("content", [b"", b"no program", b"PK\x03\x04 no program"])
def test_garbage(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "decoder.pt2"
    path.write_bytes(content)
    sentence = refused(path)
    assert sentence.startswith(f"decoder.pt2 cannot be read by torch {torch.__version__} (")
    assert "it is damaged or not an exported program; export it again" in sentence


def test_a_truncated_program(program: Path, tmp_path: Path) -> None:
    path = tmp_path / "decoder.pt2"
    path.write_bytes(program.read_bytes()[:100_000])
    assert "it is damaged or not an exported program" in refused(path)


def test_a_damaged_weight(program: Path, tmp_path: Path) -> None:
    """One that torch would load silently, and that would merely give wrong masks."""
    path = tmp_path / "decoder.pt2"
    whole = bytearray(program.read_bytes())
    with zipfile.ZipFile(program) as archive:
        weights = max(archive.infolist(), key=lambda item: item.file_size)
    whole[weights.header_offset + weights.compress_size // 2] ^= 0x40
    path.write_bytes(whole)
    sentence = refused(path)
    assert f"decoder.pt2 is damaged: the checksum of {weights.filename} in it" in sentence


@pytest.mark.parametrize(("byte", "bits"), [(6, 0x40), (8, 0x01), (10, 0x40), (50, 0xFF)], ids=str)
def test_a_damaged_table_of_contents(program: Path, tmp_path: Path, byte: int, bits: int) -> None:
    """In its first entry: another version of zip, encrypted, another compression, no UTF-8."""
    path = tmp_path / "decoder.pt2"
    whole = bytearray(program.read_bytes())
    with zipfile.ZipFile(program) as archive:
        whole[archive.start_dir + byte] ^= bits
    path.write_bytes(whole)
    assert refused(path).startswith("decoder.pt2 is damaged: ")


def test_a_program_without_read_permission(program: Path) -> None:
    """As in a container whose user did not export it: it is not called damaged."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        path = Path(name, "decoder.pt2")
        path.write_bytes(program.read_bytes())
        path.chmod(0)
        Path(name).chmod(0o711)
        if os.getuid() == 0:
            os.seteuid(65534)
        try:
            assert refused(path) == (
                "the server's user may not read decoder.pt2; fix it with: chmod o+r"
            )
        finally:
            os.seteuid(os.getuid())


def test_a_program_of_a_newer_torch_is_an_error_that_names_it(
    program: Path, tmp_path: Path
) -> None:
    """As torch itself would see it: a graph in a format that it does not know."""
    path = tmp_path / "decoder.pt2"
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(path, "w") as new:
        for item in old.infolist():
            content = old.read(item)
            if item.filename.endswith("models/model.json"):
                content = content.replace(b'"schema_version"', b'"version_of_schema"')
                content = content.replace(b"torch.ops.aten.", b"torch.ops.later.")
            if item.filename.endswith(TORCH_VERSION):
                content = b"99.1.0"
            new.writestr(item, content)
    sentence = refused(path)
    assert "it was written by torch 99.1.0; export it again with a torch that is not" in sentence


def test_the_whole_program_is_moved(program: Path) -> None:
    """To `meta`, the one other device on every machine: it rejects tensors left behind."""
    inputs = {
        "image_embed": torch.zeros(1, 64, 8, 8),
        "high_res_feats_0": torch.zeros(1, 8, 32, 32),
        "high_res_feats_1": torch.zeros(1, 16, 16, 16),
        "point_coords": torch.zeros(1, 2, 2),
        "point_labels": torch.ones(1, 2, dtype=torch.int32),
        "mask_input": torch.zeros(0, 32, 32),
        "mask_index": torch.zeros(0, dtype=torch.int64),
    }
    elsewhere = {name: value.to("meta") for name, value in inputs.items()}
    with pytest.raises(RuntimeError, match="device"):
        bind(load_program(program, CPU))(**elsewhere)
    masks, ious = bind(load_program(program, torch.device("meta")))(**elsewhere)
    assert (masks.device.type, masks.shape) == ("meta", (1, 4, 32, 32))
    assert (ious.device.type, ious.shape) == ("meta", (1, 4))


@pytest.mark.parametrize("masks", [0, 1])
def test_a_program_moves_to_a_gpu(
    program: Path, masks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a GPU that need not exist, because its tensors have no memory."""
    exported = torch.export.load(program)
    values = [node.meta.get("val") for node in exported.graph.nodes]
    memoryless = detect_fake_mode([value for value in values if isinstance(value, Tensor)])
    assert memoryless is not None
    memoryless.allow_non_fake_inputs = True
    monkeypatch.setattr(reader, "_read", lambda _: exported)
    inputs = exporter.example_inputs(tiny.ARCHITECTURE, objects=1, tokens=2, masks=masks)
    with memoryless, torch.no_grad():
        moved = load_program(program, GPU)
        answer = bind(moved)(**{name: tensor.to(GPU) for name, tensor in inputs.items()})
    assert {tensor.device for tensor in answer} == {GPU}
    assert {tensor.device for tensor in moved.state_dict.values()} == {GPU}


@pytest.mark.parametrize("tokens", [1, 12])
def test_a_bound_program_gives_the_same_as_its_module(program: Path, tokens: int) -> None:
    """Whatever the order of the inputs."""
    torch.manual_seed(tokens)
    inputs = exporter.example_inputs(tiny.ARCHITECTURE, objects=3, tokens=tokens, masks=1)
    loaded = load_program(program, CPU)
    expected = loaded.module()(**inputs)
    for ours, theirs in zip(bind(loaded)(**dict(reversed(inputs.items()))), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_a_bound_program_takes_the_same_branch_as_its_module(rows: int) -> None:
    class Either(torch.nn.Module):
        def forward(self, given: Tensor) -> tuple[Tensor, Tensor]:
            ways = (lambda x: (x - 1, x + 1), lambda x: (x * 2, x * 3))
            chosen: tuple[Tensor, Tensor] = torch.cond(given.shape[0] <= 3, *ways, (given,))
            return chosen

    shapes = ({0: torch.export.Dim("rows", max=8)},)
    either = torch.export.export(Either(), (torch.ones(5),), dynamic_shapes=shapes)
    given = torch.arange(rows, dtype=torch.float32)
    expected = either.module()(given)  # before binding, which modifies the program
    for ours, theirs in zip(bind(either)(given=given), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_gpu_that_cannot_hold_the_weights(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def move(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: all CUDA-capable devices are busy\nand more")

    monkeypatch.setattr(reader, "move_to_device_pass", move)
    with pytest.raises(ProgramError, match=r"on cuda:0 .CUDA error: all .* are busy.;"):
        load_program(program, GPU)
