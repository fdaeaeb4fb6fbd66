"""The check of an export must fail on a wrong one."""

from __future__ import annotations

import math

import onnxruntime as ort
import pytest
import torch
from torch.export import ExportedProgram

from export import check, checkpoint
from export.check import (
    Check,
    answer_iou,
    check_values,
    largest_difference,
    load_photos,
    mask_iou,
    relative_error,
)
from tests.export import tiny


def test_relative_error() -> None:
    ones = torch.ones(4)
    assert relative_error(ones, ones) == 0
    assert relative_error(ones * 1.5, ones) == pytest.approx(0.5)
    assert relative_error(torch.full((4,), math.nan), ones) == math.inf
    assert relative_error(ones, torch.full((4,), math.inf)) == math.inf


def test_largest_difference() -> None:
    ones = torch.ones(3)
    assert largest_difference(ones, ones) == 0
    assert largest_difference(ones, torch.tensor([1.0, 1.5, 0.8])) == pytest.approx(0.5)
    assert largest_difference(ones, torch.tensor([1.0, math.nan, 1.0])) == math.inf


def test_mask_iou() -> None:
    logits = torch.tensor([[1.0, 1.0], [-1.0, 0.0]])
    assert mask_iou(logits, logits) == 1
    assert mask_iou(logits, torch.tensor([[1.0, -1.0], [-1.0, -1.0]])) == 0.5
    assert mask_iou(-torch.ones(2, 2), -torch.ones(2, 2)) == 1
    assert mask_iou(logits > 0, logits > 0) == 1


def test_logits_that_are_not_finite_agree_with_nothing() -> None:
    nothing = torch.full((2, 2), math.nan)
    assert mask_iou(nothing, nothing) == 0
    assert mask_iou(torch.ones(2, 2), nothing) == 0


def test_the_answer_is_the_references_best_candidate() -> None:
    logits = torch.full((3, 2, 2), -1.0)
    theirs = logits.clone()
    theirs[1, 0] = 1
    predicted = torch.tensor([0.2, 0.9, 0.1])
    assert answer_iou((theirs, predicted.flip(0)), (theirs, predicted), side=2) == 1
    assert answer_iou((logits, predicted), (theirs, predicted), side=2) == 0
    assert answer_iou((logits, predicted), (theirs, predicted.roll(1)), side=2) == 1


def test_the_answer_is_compared_at_the_images_resolution() -> None:
    theirs = torch.tensor([[4.0, 4.0, -1.0, -4.0]]).expand(3, 4, 4)
    ours = torch.where(theirs == -1, 0.001, theirs)  # a rounding error across zero
    predicted = torch.ones(3)
    at_mask_size = answer_iou((ours, predicted), (theirs, predicted), side=4)
    at_image_size = answer_iou((ours, predicted), (theirs, predicted), side=64)
    assert at_mask_size == pytest.approx(2 / 3)
    assert at_mask_size < at_image_size < 1


@pytest.mark.parametrize(("value", "passed"), [(0.1, True), (0.3, False), (math.nan, False)])
def test_a_check_passes_within_its_limit(value: float, passed: bool) -> None:
    assert Check("error", value, limit=0.2).passed == passed
    assert Check("IoU", -value, limit=-0.2, at_least=True).passed == passed


def _values(
    exported: tiny.Export,
    program: ExportedProgram,
    changed: str,
    change: float,
    *,
    exact: bool = True,
) -> dict[str, Check]:
    model = checkpoint.load(exported.checkpoint)
    if changed:
        model.get_parameter(changed).add_(change)
    photos = load_photos(check.PHOTOS[:1], model.architecture.image_size)
    checks = check_values(
        exported.repository, program, model, photos=photos, min_iou=0.995, exact=exact
    )
    return {c.name: c for c in checks}


def test_an_exports_values_agree(exported: tiny.Export, program: ExportedProgram) -> None:
    checks = _values(exported, program, "", 0)
    assert all(c.passed for c in checks.values())
    kinds = ("point", "points", "box", "box and points", "refined mask")
    assert {f"{kind}: mask IoU" for kind in kinds} < checks.keys()


def test_the_graph_is_checked_on_the_cpu_wherever_it_is(
    exported: tiny.Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[dict[str, object]] = []
    monkeypatch.setattr(ort, "InferenceSession", lambda _, **options: opened.append(options))
    check._session(exported.repository)
    assert opened == [{"providers": ["CPUExecutionProvider"]}]


def test_a_wrong_encoder_is_found(exported: tiny.Export, program: ExportedProgram) -> None:
    checks = _values(exported, program, "trunk.blocks.0.mlp.fc1.bias", 0.01)
    assert not checks["image_embed: relative error"].passed


def test_a_wrong_decoder_is_found(exported: tiny.Export, program: ExportedProgram) -> None:
    checks = _values(exported, program, "mask_decoder.mask_tokens.weight", 0.05)
    assert checks["image_embed: relative error"].passed
    assert not checks["point: logits' relative error"].passed


@pytest.mark.parametrize("exact", [True, False])
def test_a_wrong_prediction_is_found(
    exported: tiny.Export, program: ExportedProgram, exact: bool
) -> None:
    """The answer is chosen by it; no mask depends on it otherwise."""
    own = "mask_decoder.iou_prediction_head.layers.2.bias"
    checks = _values(exported, program, own, 0.2, exact=exact)
    assert not checks["box: predicted IoU's error"].passed
    assert checks["box: mask IoU"].passed


def test_a_wrong_single_mask_is_found(exported: tiny.Export, program: ExportedProgram) -> None:
    """The answer without `multimask_output` has its own weights."""
    own = "mask_decoder.output_hypernetworks_mlps.0.layers.2.bias"
    assert not _values(exported, program, own, 0.5)["box: logits' relative error"].passed


@pytest.mark.parametrize("exact", [True, False])
def test_a_choice_flipped_by_rounding_fails_only_an_exact_check(
    exported: tiny.Export, program: ExportedProgram, exact: bool
) -> None:
    """Below a share of stable pixels, the best of several masks replaces the single one."""
    model = checkpoint.load(exported.checkpoint)
    photos = load_photos(check.PHOTOS[:1], model.architecture.image_size)
    failed: set[str] = set()
    for share in (0, 1.1):  # never and always
        model.mask_decoder.dynamic_multimask_stability_thresh = share
        checks = check_values(
            exported.repository, program, model, photos=photos, min_iou=0.995, exact=exact
        )
        failed |= {c.name for c in checks if not c.passed}
    assert ("box: mask IoU" in failed) is exact
    assert exact or not failed
    assert model.mask_decoder.dynamic_multimask_via_stability


def test_a_wrong_mask_encoder_is_found_only_by_refining(
    exported: tiny.Export, program: ExportedProgram
) -> None:
    checks = _values(exported, program, "prompt_encoder.mask_downscaling.6.weight", 0.5)
    failed = {name.partition(":")[0] for name, c in checks.items() if not c.passed}
    assert failed == {"refined mask"}


def test_values_that_are_not_finite_fail(exported: tiny.Export, program: ExportedProgram) -> None:
    checks = _values(exported, program, "trunk.pos_embed", math.nan)
    assert not any(c.passed for c in checks.values())


@pytest.mark.parametrize(
    ("changed", "passed"),
    [
        ("", True),
        ("trunk.blocks.0.attn.qkv.bias", False),
        ("trunk.blocks.0.mlp.fc1.bias", False),
        ("mask_decoder.conv_s1.bias", False),
    ],
)
def test_values_that_would_overflow_on_a_gpu_fail_in_half_precision(
    exported: tiny.Export, program: ExportedProgram, changed: str, passed: bool
) -> None:
    checks = _values(exported, program, changed, 4e4, exact=False)
    assert checks["largest value in FP16"].passed == passed
    assert "image_embed: relative error" not in checks
