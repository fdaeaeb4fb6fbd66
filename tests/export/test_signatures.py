"""Every mismatch in an exported repository must be found."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from torch.export import ExportedProgram

from export.repository import DECODER, ENCODER, ENSEMBLE
from export.signatures import SignatureError, check_signatures
from tests.export import tiny


def test_the_exports_signatures_agree(exported: tiny.Export, program: ExportedProgram) -> None:
    check_signatures(exported.repository, program)


def test_half_precision_signatures_agree(
    exported_fp16: tiny.Export, program: ExportedProgram
) -> None:
    """The decoder is the same in both: only the encoder has the type."""
    check_signatures(exported_fp16.repository, program)


WRONG = {
    "the graph's type": (ENCODER, "TYPE_UINT8", "TYPE_FP32"),
    "the graph's size": (ENCODER, "[ 8, 32, 32 ]", "[ 8, 32, 31 ]"),
    "the graph's name": (ENCODER, '"high_res_feats_1"', '"high_res_feats_2"'),
    "the program's size": (DECODER, "[ -1, 32, 32 ]", "[ -1, 16, 16 ]"),
    "the program's embedding": (DECODER, "[ 64, 8, 8 ]", "[ 32, 8, 8 ]"),
    "the program's output": (DECODER, "[ -1, -1, 32, 32 ]", "[ -1, -1, 16, 16 ]"),
    "a wire's two ends": (ENSEMBLE, "TYPE_INT32", "TYPE_INT64"),
    "the ensemble's output": (ENSEMBLE, "dims: [ -1, -1, 32, 32 ]", "dims: [ -1, 32, 32 ]"),
    "a wire from nowhere": (ENSEMBLE, 'value: "mask_input" }', 'value: "masks" }'),
    "a wire to nowhere": (ENSEMBLE, 'key: "mask_input"', 'key: "masks"'),
    "an output of no model": (ENSEMBLE, '{ key: "image_id" value', '{ key: "id" value'),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_disagreement_is_found(
    exported: tiny.Export, program: ExportedProgram, tmp_path: Path, what: str
) -> None:
    model, right, wrong = WRONG[what]
    repository = tmp_path / "models"
    shutil.copytree(exported.repository, repository)
    config = repository / model / "config.pbtxt"
    assert right in config.read_text()
    config.write_text(config.read_text().replace(right, wrong))
    with pytest.raises(SignatureError):
        check_signatures(repository, program)
