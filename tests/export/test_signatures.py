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
    "the graph's type": (
        (ENCODER, "TYPE_UINT8", "TYPE_FP32"),
        r"the encoder's inputs disagree:\n.*'UINT8'.*\n.*'FP32'",
    ),
    "the graph's size": (
        (ENCODER, "[ 8, 32, 32 ]", "[ 8, 32, 31 ]"),
        r"the encoder's outputs disagree:\n.*\(8, 32, 32\).*\n.*\(8, 32, 31\)",
    ),
    "the graph's name": (
        (ENCODER, '"high_res_feats_1"', '"high_res_feats_2"'),
        r"the encoder's outputs disagree:\n.*'high_res_feats_1'.*\n.*'high_res_feats_2'",
    ),
    "the program's size": (
        (DECODER, "[ -1, 32, 32 ]", "[ -1, 16, 16 ]"),
        r"the decoder's mask_input is \(-1, 32, 32\), but .*'mask_input': \('FP16', \(-1, 16, 16\)",
    ),
    "the program's embedding": (
        (DECODER, "[ 64, 8, 8 ]", "[ 32, 8, 8 ]"),
        r"the decoder's image_embed is \(64, 8, 8\), but .*'image_embed': \('FP32', \(32, 8, 8\)",
    ),
    "the program's output": (
        (DECODER, "[ -1, -1, 32, 32 ]", "[ -1, -1, 16, 16 ]"),
        r"the decoder's low_res_masks is .*32, 32\), but its config has \(-1, -1, 16, 16\)",
    ),
    "a wire's two ends": (
        (ENSEMBLE, "TYPE_INT32", "TYPE_INT64"),
        r"the ends of point_labels into sam3_prompt_decoder disagree:\n.*'INT64'.*\n.*'INT32'",
    ),
    "the ensemble's output": (
        (ENSEMBLE, "dims: [ -1, -1, 32, 32 ]", "dims: [ -1, 32, 32 ]"),
        r"sam3_interactive's outputs disagree:\n.*\(-1, 32, 32\).*\n.*\(-1, -1, 32, 32\)",
    ),
    "a wire from nowhere": (
        (ENSEMBLE, 'value: "mask_input" }', 'value: "masks" }'),
        "no step outputs masks for sam3_prompt_decoder.mask_input",
    ),
    "a wire to nowhere": (
        (ENSEMBLE, 'key: "mask_input"', 'key: "masks"'),
        "the ends of mask_input into sam3_prompt_decoder disagree:\n.*\n.*'masks': None",
    ),
    "an output of no model": (
        (ENSEMBLE, '{ key: "image_id" value', '{ key: "id" value'),
        "sam3_prompt_decoder has no output id",
    ),
}
"""What disagrees: (model, text of its config, text in its place), and what is said about it."""


@pytest.mark.parametrize("what", WRONG)
def test_a_disagreement_is_found(
    exported: tiny.Export, program: ExportedProgram, tmp_path: Path, what: str
) -> None:
    (model, right, wrong), sentence = WRONG[what]
    repository = tmp_path / "models"
    shutil.copytree(exported.repository, repository)
    config = repository / model / "config.pbtxt"
    assert right in config.read_text()
    config.write_text(config.read_text().replace(right, wrong))
    with pytest.raises(SignatureError, match=sentence):
        check_signatures(repository, program)
