"""The decoder's program: Meta's function, traced once for any number of objects, tokens, masks."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from export import mask_decoder
from export.architecture import Architecture, InteractiveModel, build_mask_decoder
from export.decoder import (
    TORCH_VERSION,
    PromptDecoder,
    example_inputs,
    export_decoder,
    save_decoder,
)
from export.mask_decoder import few_tokens
from export.repository import DECODER
from tests.conftest import ROOT
from tests.export import tiny

Inputs = dict[str, Tensor]

OWN_TOKENS = 6
"""The decoder's own tokens: object score, IoU and four masks."""


@pytest.fixture(scope="module")
def path(exported: tiny.Export) -> Path:
    return exported.repository / DECODER / "1" / "decoder.pt2"


@pytest.fixture(scope="module")
def program(path: Path) -> ExportedProgram:
    return torch.export.load(path)


def _inputs(objects: int, tokens: int, masks: int) -> Inputs:
    torch.manual_seed(objects + 10 * tokens + 100 * masks)
    inputs = example_inputs(tiny.ARCHITECTURE, objects, tokens, masks)
    labels = torch.randint(-1, 4, inputs["point_labels"].shape, dtype=torch.int32)
    chosen = torch.randperm(objects)[:masks]
    return {**inputs, "point_labels": labels, "mask_index": chosen}


def test_no_matrix_product_rounds_a_prompts_position(program: ExportedProgram) -> None:
    """On GPUs products are in TF32, with 10 bits, which 1008 pixels need just for whole pixels."""
    aten = torch.ops.aten
    products = (aten.linear.default, aten.matmul.default, aten.bmm.default, aten.baddbmm.default)
    widths = [
        node.args[node.target is aten.baddbmm.default].meta["val"].shape[-1]
        for module in program.graph_module.modules()
        if isinstance(module, GraphModule)
        for node in module.graph.nodes
        if node.target in products
    ]
    assert len(widths) > 20
    assert all(not isinstance(width, int) or width > 2 for width in widths)


SIZES = [(1, 0, 1), (1, 2, 0), (2, 3, 1), (5, 4, 5), (17, 9, 3)]


@pytest.mark.parametrize(("objects", "tokens", "masks"), SIZES)
def test_the_program_computes_what_was_traced(
    model: InteractiveModel, program: ExportedProgram, objects: int, tokens: int, masks: int
) -> None:
    inputs = _inputs(objects, tokens, masks)
    for ours, theirs in zip(
        program.module()(**inputs), PromptDecoder(model)(**inputs), strict=True
    ):
        assert torch.equal(ours, theirs)


def _metas(model: Any, inputs: Inputs, n: int, multimask: bool) -> tuple[Tensor, Tensor]:
    """One object through Meta's own modules; their padding point is the program's last token."""
    coords = inputs["point_coords"][n : n + 1, :-1] * tiny.ARCHITECTURE.image_size
    given = inputs["mask_input"][inputs["mask_index"] == n]
    sparse, dense = model.prompt_encoder(
        points=(coords, inputs["point_labels"][n : n + 1, :-1]),
        boxes=None,
        masks=given.unsqueeze(1) if len(given) else None,
    )
    masks, ious, _, _ = model.mask_decoder(
        image_embeddings=inputs["image_embed"][n : n + 1],
        image_pe=model.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask,
        repeat_image=False,
        high_res_features=[inputs[f"high_res_feats_{i}"][n : n + 1] for i in range(2)],
    )
    return masks[0], ious[0]


def _check_against_metas(
    decoder: Callable[..., tuple[Tensor, Tensor]], model: InteractiveModel, tokens: int
) -> None:
    inputs = _inputs(objects=6, tokens=tokens, masks=3)
    inputs["point_labels"][:, -1] = -1
    inputs["point_coords"][:, -1] = 0
    masks, ious = decoder(**inputs)
    for n in range(6):
        for multimask, rows in ((False, slice(0, 1)), (True, slice(1, None))):
            logits, scores = _metas(model, inputs, n, multimask)
            torch.testing.assert_close(masks[n, rows], logits, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ious[n, rows], scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 4, 9])
def test_every_candidate_is_the_same_as_metas(model: InteractiveModel, tokens: int) -> None:
    _check_against_metas(PromptDecoder(model), model, tokens)


def test_both_paths_for_few_and_many_tokens_give_metas_masks(
    model: InteractiveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny model's heads are too small for merging to pay, so only one path would be tested."""
    monkeypatch.setattr(mask_decoder, "few_tokens", lambda _: OWN_TOKENS + 4)
    program = export_decoder(model).module()
    for tokens in (1, 4, 5, 9):
        _check_against_metas(program, model, tokens)


def test_projecting_tokens_twice_pays_for_a_click_and_some_corrections() -> None:
    """Agrees with measurements: more than ten points, with 72² pixels and with 16²."""
    attention = build_mask_decoder(Architecture()).transformer.final_attn_token_to_image
    assert 10 < few_tokens(attention) - OWN_TOKENS < 20


def test_the_file_records_its_torch_version_and_no_inputs(
    path: Path, program: ExportedProgram, tmp_path: Path
) -> None:
    with zipfile.ZipFile(path) as archive:
        sizes = {Path(entry.filename).parts[1:]: entry.file_size for entry in archive.infolist()}
        assert archive.read("archive/extra/" + TORCH_VERSION).decode() == torch.__version__
        assert sizes["data", "sample_inputs", "model.pt"] < 1000
        assert str(ROOT).encode() not in archive.read("archive/models/model.json")
    assert program.example_inputs is None
    save_decoder(program, tmp_path / "again.pt2")
    weights = sum(p.numel() * p.element_size() for p in program.parameters())
    assert (tmp_path / "again.pt2").stat().st_size < weights + 2_000_000


def test_writing_to_a_full_disk_is_an_os_error(program: ExportedProgram) -> None:
    with pytest.raises(OSError, match="No space left"):
        save_decoder(program, Path("/dev/full"))
