"""Requests as they go on the wire, and answers as they are read, without a server."""

from typing import Any

import numpy as np
import pytest
from tritonclient.utils import np_to_triton_dtype

from triton_sam3 import contract
from triton_sam3.errors import ServerError
from triton_sam3.flow import Array, Infer, InSharedMemory
from triton_sam3.prompts import PackedPrompts, Prompt, pack
from triton_sam3.protocol import (
    Flags,
    ServedModel,
    click_request,
    digest,
    image_request,
    keep_request,
    read_answer,
    read_image_id,
)

S, M = 56, 16
CLICK_INPUTS = (contract.IMAGE_ID, *contract.PROMPTS)
IMAGE = np.zeros((S, S, 3), np.uint8)
POINT = Prompt(points=[(10, 20)])
BOX = Prompt(box=(0, 0, 30, 40))
REFINED = Prompt(points=[(10, 20)], mask=np.zeros((M, M), np.float16))


def packed(*prompts: Prompt) -> PackedPrompts:
    return pack(prompts, 100, 80, M)


@pytest.mark.parametrize("multimask_output", [True, False])
@pytest.mark.parametrize("keep_image", [True, False])
@pytest.mark.parametrize("prompts", [[POINT], [BOX, POINT], [REFINED, BOX]])
def test_every_input_has_the_declared_type_and_axes(
    prompts: list[Prompt], keep_image: bool, multimask_output: bool
) -> None:
    flags = Flags(multimask_output, keep_image)
    for request, allowed in (
        (image_request(IMAGE, "d", packed(*prompts), flags), contract.INTERACTIVE_INPUTS),
        (click_request(b"id", "d", packed(*prompts), flags), CLICK_INPUTS),
    ):
        declared = {tensor.name: tensor for tensor in allowed}
        for name, array in request.inputs.items():
            assert isinstance(array, np.ndarray)
            assert np_to_triton_dtype(array.dtype) == declared[name].datatype
            assert array.ndim == len(declared[name].axes)
            assert len(array) == 1


def test_only_flags_that_differ_from_the_default_are_sent() -> None:
    plain = image_request(IMAGE, "d", packed(POINT), Flags())
    assert set(plain.inputs) == {"image", "point_coords", "point_labels", "best_only"}
    every = image_request(IMAGE, "d", packed(REFINED), Flags(False, True))
    assert set(every.inputs) == set(plain.inputs) | {
        "mask_input",
        "multimask_output",
        "keep_image",
    }


def test_only_needed_outputs_are_requested() -> None:
    logits = {"low_res_masks", "iou_predictions"}
    assert set(image_request(IMAGE, "d", packed(POINT), Flags()).outputs) == logits
    kept = image_request(IMAGE, "d", packed(POINT), Flags(keep_image=True))
    assert set(kept.outputs) == logits | {"image_id"}
    assert keep_request(IMAGE, "d", packed(POINT)).outputs == ("image_id",)
    assert set(click_request(b"id", "d", packed(POINT), Flags()).outputs) == logits


def arrays(request: Infer) -> dict[str, Array]:
    """Its inputs; none lies in shared memory."""
    return {name: v for name, v in request.inputs.items() if not isinstance(v, InSharedMemory)}


def test_a_click_carries_no_image() -> None:
    click = click_request(b"x" * 32, "d", packed(POINT), Flags(multimask_output=False))
    assert click.model == contract.DECODER
    sizes = {name: value.nbytes for name, value in arrays(click).items() if name != "image_id"}
    # one token of x, y and label, two flags
    assert sizes == {"point_coords": 8, "point_labels": 4, "best_only": 1, "multimask_output": 1}
    assert arrays(click)["image_id"].tolist() == [[b"x" * 32]]


def test_a_refining_click_carries_one_plane_of_logits_and_no_image() -> None:
    plain = click_request(b"x" * 32, "d", packed(POINT), Flags())
    refining = click_request(b"x" * 32, "d", packed(REFINED), Flags())
    assert set(refining.inputs) - set(plain.inputs) == {"mask_input"}
    assert arrays(refining)["mask_input"].shape == (1, 1, M, M)
    assert arrays(refining)["mask_input"].nbytes == M * M * 2


@pytest.mark.parametrize("prompts", [[POINT], [REFINED]])
def test_every_request_has_the_headers_for_its_image_and_its_work(prompts: list[Prompt]) -> None:
    for request, work in (
        (image_request(IMAGE, "d", packed(*prompts), Flags()), "encode"),
        (keep_request(IMAGE, "d", packed(*prompts)), "encode"),
        (click_request(b"id", "d", packed(*prompts), Flags()), "click"),
    ):
        assert request.headers == {"x-sam3-image": "d", "x-sam3-work": work}


def test_digest_depends_on_content_and_shape_alone() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    same = np.ascontiguousarray(pixels[::-1])[::-1]
    other = pixels.copy()
    other[5, 3, 2] ^= 1
    assert digest(pixels) == digest(same)
    assert len({digest(pixels), digest(other), digest(pixels.reshape(4, 6, 3))}) == 3


@pytest.mark.parametrize("rows", [1, 1398, 1399, 3000])  # 1000 × 3 bytes each, around 4 MiB
def test_digest_of_a_large_image_depends_on_every_row(rows: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (rows, 1000, 3), dtype=np.uint8)
    digests = {digest(pixels)}
    for row in {0, rows // 2, rows - 1}:
        other = pixels.copy()
        other[row, 500, 1] ^= 1
        digests.add(digest(other))
    assert len(digests) == 1 + len({0, rows // 2, rows - 1})


def answer(objects: int, candidates: int = 1) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {
        "low_res_masks": rng.normal(size=(1, objects, candidates, M, M)).astype(np.float16),
        "iou_predictions": rng.random((1, objects, candidates), dtype=np.float32),
    }


def test_an_answer_loses_its_batch_and_candidate_axes() -> None:
    outputs = answer(3)
    read = read_answer(outputs, 3)
    np.testing.assert_array_equal(read.logits, outputs["low_res_masks"][0, :, 0])
    np.testing.assert_array_equal(read.scores, outputs["iou_predictions"][0, :, 0])
    assert read.image_id == b""


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        answer(2),
        answer(3, candidates=3),
        *(
            {"low_res_masks": np.zeros(shape, np.float16)}
            for shape in [(1, 3, 1), (1, 3, 1, 0, 0), (1, 3, 1, M, 0), (1, 3, 1, M, M + 1)]
        ),
        *({"low_res_masks": np.zeros((1, 3, 1, M, M), dtype)} for dtype in (object, np.float32)),
    ],
)
def test_an_answer_of_another_shape_or_type_is_rejected(wrong: dict[str, Array]) -> None:
    with pytest.raises(ServerError, match=r"low_res_masks.*FP16.*N = 3"):
        read_answer(wrong, 3)


def test_scores_of_another_type_are_rejected() -> None:
    scores = np.array([[[b"0.9"]]], object)
    with pytest.raises(ServerError, match=r"object \[1, 1, 1\] for 'iou_predictions'.*FP32"):
        read_answer({**answer(1), "iou_predictions": scores}, 1)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (None, b""),
        (np.array([[b""]], object), b""),
        (np.array([[b"ab"]], object), b"ab"),
        (np.array([["ab"]], object), b"ab"),
        (np.empty((1, 0), object), b""),
    ],
)
def test_an_image_id_is_bytes_over_either_transport(ids: Array | None, expected: bytes) -> None:
    assert read_image_id({} if ids is None else {"image_id": ids}) == expected


def test_an_image_id_that_is_a_number_is_rejected() -> None:
    with pytest.raises(ServerError, match=r"int64 \[1, 1\] for 'image_id', expected BYTES"):
        read_image_id({"image_id": np.array([[7]])})


DECODER = {
    "parameters": {"max_objects": {"string_value": "7"}, "max_tokens": {"string_value": "9"}}
}


def interactive(image: Any, mask: Any) -> dict[str, object]:
    inputs = [{"name": "image", "dims": image}, {"name": "mask_input", "dims": mask}]
    return {"name": "sam3_interactive", "input": inputs}


def test_sizes_and_limits_are_read_from_the_configuration() -> None:
    served = ServedModel.from_configs(interactive([S, S, 3], [-1, M, M]), DECODER)
    assert served == ServedModel(S, M, max_objects=7, max_tokens=9)


def test_numbers_may_be_text_as_over_grpc() -> None:
    served = ServedModel.from_configs(interactive(["56", "56", "3"], ["-1", "16", "16"]), DECODER)
    assert (served.image_side, served.mask_side) == (56, 16)


def test_a_configuration_of_another_model_is_rejected_by_name() -> None:
    with pytest.raises(ServerError, match="'resnet' has no input 'image'"):
        ServedModel.from_configs({"name": "resnet", "input": []}, {})


SIDES: list[Any] = [0, -5, 100_000, 10**30, "x", None, [], 1e400]


@pytest.mark.parametrize("side", SIDES)
def test_an_impossible_side_is_quoted_with_what_is_accepted(side: Any) -> None:
    good = [56, 56, 3], [-1, M, M]
    for image, mask in (([side, side, 3], good[1]), (good[0], [-1, side, side])):
        with pytest.raises(
            ServerError, match=r"input '(image|mask_input)' with the dims"
        ) as caught:
            ServedModel.from_configs(interactive(image, mask), DECODER)
        assert "from 1 to 8192; serve the repository" in str(caught.value)


@pytest.mark.parametrize("dims", [[], [56], [56, 55, 3], [56, 56, 3, 1], "56", 5, {}])
def test_dims_of_another_form_are_quoted(dims: Any) -> None:
    with pytest.raises(ServerError, match=r"with the dims .* needs dims \['S', 'S', 3\] with S"):
        ServedModel.from_configs(interactive(dims, [-1, M, M]), DECODER)


@pytest.mark.parametrize("limit", ["0", "-3", "x", "", "1.5", [], 1e400])
@pytest.mark.parametrize("name", ["max_objects", "max_tokens"])
def test_an_impossible_limit_is_quoted(name: str, limit: Any) -> None:
    parameters = {**DECODER["parameters"], name: {"string_value": limit}}
    decoder = {"name": "sam3_prompt_decoder", "parameters": parameters}
    with pytest.raises(ServerError, match=rf"parameter '{name}' with the value .* at least 1"):
        ServedModel.from_configs(interactive([56, 56, 3], [-1, M, M]), decoder)


@pytest.mark.parametrize("wrong", [None, 5, "x", [], [5], {}, {"max_objects": 5}])
def test_a_configuration_of_another_form_names_what_is_missing(wrong: Any) -> None:
    image = interactive([56, 56, 3], [-1, M, M])
    with pytest.raises(ServerError, match="no input 'image'"):
        ServedModel.from_configs({"input": wrong}, DECODER)
    with pytest.raises(ServerError, match="no parameter 'max_objects'"):
        ServedModel.from_configs(image, {"parameters": wrong})
