"""The wire contract of the served models: inputs, outputs, and what is rejected."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tritonclient import grpc
from tritonclient.utils import shared_memory

from server import TritonServer
from tests.model_repository.sam3_prompt_decoder.served import (
    DECODER,
    ENCODER,
    ENSEMBLE,
    FEATURES,
    INVALID,
    NOT_FOUND,
    Array,
    Served,
    alike,
    by_id,
    clicks,
    flag,
    id_of,
)
from tests.server import tiny
from triton_sam3.status import store_metrics

Signature = dict[str, tuple[str, list[int | str]]]

PROMPT_INPUTS: Signature = {
    "point_coords": ("FP32", [-1, -1, -1, 2]),
    "point_labels": ("INT32", [-1, -1, -1]),
    "mask_input": ("FP16", [-1, -1, "M", "M"]),
    "multimask_output": ("BOOL", [-1, 1]),
    "best_only": ("BOOL", [-1, 1]),
    "keep_image": ("BOOL", [-1, 1]),
}
INPUTS: dict[str, Signature] = {
    ENSEMBLE: {"image": ("UINT8", [-1, "S", "S", 3]), **PROMPT_INPUTS},
    DECODER: {
        "image_embed": ("FP32", [-1, 256, "E", "E"]),
        "high_res_feats_0": ("FP32", [-1, 32, "M", "M"]),
        "high_res_feats_1": ("FP32", [-1, 64, "H", "H"]),
        "image_id": ("BYTES", [-1, 1]),
        **PROMPT_INPUTS,
    },
}
OUTPUTS: Signature = {
    "low_res_masks": ("FP16", [-1, -1, -1, "M", "M"]),
    "iou_predictions": ("FP32", [-1, -1, -1]),
    "image_id": ("BYTES", [-1, 1]),
}
REQUIRED = {
    ENSEMBLE: {"image", "point_coords", "point_labels"},
    DECODER: {"point_coords", "point_labels"},
}


@pytest.fixture(scope="module", params=["grpc", "http"])
def served(request: pytest.FixtureRequest, server: TritonServer) -> Served:
    return Served(server, request.param)


@pytest.fixture(scope="module")
def side(server: TritonServer) -> int:
    return Served(server).dims(ENSEMBLE)["image"][0]


@pytest.fixture(scope="module")
def mask_side(server: TritonServer) -> int:
    return Served(server).dims()["mask_input"][-1]


def pictures(count: int, side: int, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {"image": rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)}


@pytest.fixture(scope="module")
def image_id(server: TritonServer, side: int) -> str:
    """The id under which `pictures(1, side)` is kept."""
    answer = Served(server).ask(ENSEMBLE, **pictures(1, side), **clicks(1), keep_image=flag(True))
    return id_of(answer)


@pytest.mark.parametrize("model", INPUTS)
def test_names_types_and_shapes(served: Served, side: int, model: str) -> None:
    sizes = {"S": side, "E": side // 14, "H": side // 7, "M": 4 * (side // 14)}
    metadata = served.metadata(model)
    for kind, contract in (("inputs", INPUTS[model]), ("outputs", OUTPUTS)):
        found = {t["name"]: (t["datatype"], [int(d) for d in t["shape"]]) for t in metadata[kind]}
        assert found == {
            name: (datatype, [sizes.get(str(axis), axis) for axis in axes])
            for name, (datatype, axes) in contract.items()
        }
    optional = {t["name"] for t in served.config(model)["input"] if t.get("optional")}
    assert INPUTS[model].keys() - optional == REQUIRED[model]


@pytest.mark.parametrize("objects", [0, 1, 5])
@pytest.mark.parametrize("images", [1, 2, 3])
def test_an_answer_for_every_object_of_every_image(
    served: Served, side: int, mask_side: int, images: int, objects: int
) -> None:
    for options, candidates, kept in (
        ({}, 3, False),
        ({"best_only": flag(True, images), "keep_image": flag(True, images)}, 1, True),
        ({"multimask_output": flag(False, images)}, 1, False),
    ):
        question = {**pictures(images, side), **clicks(objects, 2, images), **options}
        answer = served.ask(ENSEMBLE, **question)
        assert answer.keys() == OUTPUTS.keys()
        assert answer["low_res_masks"].shape == (images, objects, candidates, mask_side, mask_side)
        assert answer["iou_predictions"].shape == (images, objects, candidates)
        assert answer["image_id"].shape == (images, 1)
        assert answer["low_res_masks"].dtype == np.float16
        assert answer["iou_predictions"].dtype == np.float32
        ids = {id_of(answer, image) for image in range(images)}
        assert ids == {""} if not kept else len(ids) == images and "" not in ids


def test_the_ensemble_is_the_encoder_and_the_decoder(served: Served, side: int) -> None:
    """By embeddings, by id, and in one go: the same masks."""
    image, question = pictures(2, side), clicks(3, 2, 2)
    whole = served.ask(ENSEMBLE, **image, **question, keep_image=flag(True, 2))
    embedded = served.ask(ENCODER, **image)
    assert embedded.keys() == set(FEATURES)
    parts = served.ask(DECODER, **embedded, **question)
    for i in range(2):
        one = {name: array[i : i + 1] for name, array in question.items()}
        clicked = served.ask(DECODER, **by_id(id_of(whole, i)), **one)
        for name in ("low_res_masks", "iou_predictions"):
            alike(parts[name][i], whole[name][i])
            alike(clicked[name][0], whole[name][i])


def test_an_image_does_not_depend_on_its_batch(served: Served, side: int) -> None:
    image, question = pictures(3, side), clicks(2, 1, 3)
    together = served.ask(ENSEMBLE, **image, **question)
    for i in range(3):
        one = {name: array[i : i + 1] for name, array in (image | question).items()}
        alike(served.ask(ENSEMBLE, **one)["low_res_masks"][0], together["low_res_masks"][i])


@pytest.mark.semantic("masks", "padding changes nothing, to the bit", "equality")
def test_padding_changes_nothing_to_the_bit(served: Served, image_id: str) -> None:
    plain = clicks(2, 2)
    padding = {"point_coords": np.full((1, 2, 5, 2), np.nan, np.float32)}
    padding["point_labels"] = np.full((1, 2, 5), -1, np.int32)
    padded = {name: np.concatenate((plain[name], padding[name]), axis=2) for name in plain}
    first = served.ask(DECODER, **by_id(image_id), **plain)
    second = served.ask(DECODER, **by_id(image_id), **padded)
    for name in ("low_res_masks", "iou_predictions"):
        np.testing.assert_array_equal(first[name], second[name])


def test_a_mask_is_refined_with_points_or_alone(
    served: Served, image_id: str, mask_side: int
) -> None:
    image, click = by_id(image_id), clicks(2)
    first = served.ask(DECODER, **image, **click)
    mask = first["low_res_masks"][:, :, 0]
    refined = served.ask(DECODER, **image, **click, mask_input=mask)
    nothing = {**click, "point_labels": np.full((1, 2, 1), -1, np.int32)}
    alone = served.ask(DECODER, **image, **nothing, mask_input=mask)
    masks = [answer["low_res_masks"] for answer in (first, refined, alone)]
    assert not any(np.array_equal(a, b) for a, b in zip(masks, masks[1:] + masks[:1], strict=True))


def test_some_objects_of_a_request_have_masks(served: Served, image_id: str) -> None:
    """A plane of NaN, and a `mask_input` without planes, mean no mask."""
    image, click = by_id(image_id), clicks(2)
    plain = served.ask(DECODER, **image, **click)
    mask = plain["low_res_masks"][:, :, 0].copy()
    refined = served.ask(DECODER, **image, **click, mask_input=mask)
    mask[:, 1] = np.nan
    mixed = served.ask(DECODER, **image, **click, mask_input=mask)
    alike(mixed["low_res_masks"][0, 0], refined["low_res_masks"][0, 0])
    alike(mixed["low_res_masks"][0, 1], plain["low_res_masks"][0, 1])
    without = served.ask(DECODER, **image, **click, mask_input=mask[:, :0])
    np.testing.assert_array_equal(without["low_res_masks"], plain["low_res_masks"])


def test_only_requested_outputs_are_returned(server: TritonServer, image_id: str) -> None:
    served = Served(server)
    requested = [grpc.InferRequestedOutput("iou_predictions")]
    inputs = served._inputs({**by_id(image_id), **clicks(1)})
    result = served.client.infer(DECODER, inputs, outputs=requested)
    assert [output.name for output in result.get_response().outputs] == ["iou_predictions"]


# What is rejected: (arrays, message), for one object of one token unless stated otherwise.

BAD_PROMPTS: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"point_coords": np.zeros((1, 2), np.float32)}, "unexpected shape for input"),
    "last dimension": (
        {"point_coords": np.zeros((1, 1, 1, 3), np.float32)},
        r"unexpected shape for input 'point_coords'.* got \[1,1,1,3\]",
    ),
    "N differs": (
        {"point_labels": np.ones((1, 2, 1), np.int32)},
        r"point_labels has shape \[2, 1\]; expected \[1, 1\], one label for each pair",
    ),
    "P differs": (
        {"point_labels": np.ones((1, 1, 2), np.int32)},
        r"point_labels has shape \[1, 2\]; expected \[1, 1\]",
    ),
    "NaN": (
        {"point_coords": np.full((1, 1, 1, 2), np.nan, np.float32)},
        r"point_coords\[0, 0\] is \(nan, nan\); x and y must be finite fractions",
    ),
    "infinite": (
        {"point_coords": np.full((1, 1, 1, 2), np.inf, np.float32)},
        r"point_coords\[0, 0\] is \(inf, inf\); x and y must be finite",
    ),
    "pixels": (
        {"point_coords": np.full((1, 1, 1, 2), 200, np.float32)},
        r"point_coords\[0, 0\] is \(200, 200\); .* from 0 to 1",
    ),
    "negative": (
        {"point_coords": np.full((1, 1, 1, 2), -0.5, np.float32)},
        r"point_coords\[0, 0\] is \(-0.5, -0.5\)",
    ),
    "label": (
        {"point_labels": np.full((1, 1, 1), 4, np.int32)},
        r"point_labels\[0, 0\] is 4; accepted are 1 \(positive point\), 0",
    ),
    "half a box": (
        {"point_labels": np.full((1, 1, 1), 2, np.int32)},
        r"object 0 has 1 top-left \(label 2\) and 0 bottom-right \(label 3\) box corners",
    ),
    "nothing": (
        {"point_labels": np.full((1, 1, 1), -1, np.int32)},
        "object 0 has neither a point nor a box nor a mask; give it at least one of them",
    ),
    "too many objects": (
        clicks(257),
        "257 objects in one request; at most 256 in all its images are accepted",
    ),
    "too many tokens": (clicks(1, 129), "129 tokens per object; at most 128 are accepted"),
    "type": (
        {"point_coords": np.zeros((1, 1, 1, 2), np.float64)},
        "data-type is 'FP64', but model .* expects 'FP32'",
    ),
    "batch": (clicks(1, images=2), "batch size does not match|batch-size"),
}


@pytest.mark.parametrize("model", [ENSEMBLE, DECODER])
@pytest.mark.parametrize("what", BAD_PROMPTS)
def test_an_invalid_prompt_is_rejected_with_a_sentence(
    served: Served, side: int, image_id: str, model: str, what: str
) -> None:
    changes, sentence = BAD_PROMPTS[what]
    image = pictures(1, side) if model == ENSEMBLE else by_id(image_id)
    said = served.refused(model, **{**image, **clicks(1), **changes})
    assert re.search(sentence, said), said
    assert "Traceback" not in said
    assert "/" not in said.replace("and/or", "")


@pytest.mark.parametrize("model", [ENSEMBLE, DECODER])
def test_an_invalid_mask_is_rejected_with_a_sentence(
    served: Served, side: int, mask_side: int, image_id: str, model: str
) -> None:
    image = pictures(1, side) if model == ENSEMBLE else by_id(image_id)
    holed = np.zeros((1, 1, mask_side, mask_side), np.float16)
    holed[0, 0, 3, 3] = np.nan
    for mask, sentence in (
        (np.zeros((1, 2, mask_side, mask_side), np.float16), "expected \\[1, "),
        (np.zeros((1, 1, mask_side, mask_side - 1), np.float16), "unexpected shape for input"),
        (holed, r"mask_input\[0\] has NaN or infinite logits"),
    ):
        assert re.search(sentence, served.refused(model, **image, **clicks(1), mask_input=mask))


def test_images_of_a_batch_must_agree_in_the_number_of_masks(served: Served, side: int) -> None:
    question = {**pictures(2, side), **clicks(1, images=2)}
    mixed = np.array([[True], [False]])
    said = served.refused(ENSEMBLE, **question, multimask_output=mixed)
    assert "one mask per object in some images of the batch and for three in others" in said
    single = {"multimask_output": mixed, "best_only": flag(True, 2)}
    assert served.ask(ENSEMBLE, **question, **single)["low_res_masks"].shape[2] == 1


def test_more_images_than_a_batch_holds_are_rejected(served: Served, side: int) -> None:
    said = served.refused(ENSEMBLE, **pictures(9, side), **clicks(1, images=9))
    assert "batch-size must be <= 8" in said


def test_an_image_must_be_given_in_one_way(served: Served, image_id: str) -> None:
    sentence = "give an image either as all of image_embed, high_res_feats_0, high_res_feats_1 or"
    dims = served.dims()
    features = {name: np.zeros((1, *dims[name]), np.float32) for name in FEATURES}
    for image in ({}, dict(list(features.items())[:2]), {**features, **by_id(image_id)}):
        assert sentence in served.refused(DECODER, **image, **clicks(1))


def test_objects_of_all_images_are_limited_together(served: Served, image_id: str) -> None:
    """To what one image may have: its memory and time would be 16 times as much."""
    images = 8
    limit = int(served.config(DECODER)["parameters"]["max_objects"]["string_value"])
    ids = {"image_id": np.full((images, 1), image_id, np.object_)}
    answer = served.ask(DECODER, **ids, **clicks(limit // images, images=images))
    assert answer["iou_predictions"].shape[:2] == (images, limit // images)
    more = limit // images + 1
    sentence = served.refused(DECODER, INVALID, **ids, **clicks(more, images=images))
    assert sentence == (
        f"{more} objects in each of {images} images in one request; at most {limit} in all its "
        "images are accepted: split the request (keep_image avoids encoding an image again)"
    )


def test_an_error_in_a_batch_names_its_image(served: Served, image_id: str) -> None:
    prompts = clicks(1, images=3)
    prompts["point_coords"] = prompts["point_coords"].copy()
    prompts["point_coords"][2, 0, 0] = 1.5
    ids = {"image_id": np.full((3, 1), image_id, np.object_)}
    sentence = served.refused(DECODER, INVALID, **ids, **prompts)
    assert sentence.startswith("point_coords[0, 0] is (1.5, 1.5)")
    assert sentence.endswith(" (image 2 of the request)")


@pytest.mark.parametrize("name", FEATURES)
def test_embeddings_without_finite_masks_are_rejected(
    served: Served, server: TritonServer, side: int, name: str
) -> None:
    embeddings = {n: a.copy() for n, a in Served(server).ask(ENCODER, **pictures(1, side)).items()}
    embeddings[name][0, 0] = np.nan
    failures = store_metrics(server.metrics_url, 10)["sam3_failures_total"]
    sentence = served.refused(DECODER, INVALID, **embeddings, **clicks(1))
    assert "embeddings give masks that are not finite" in sentence
    assert "ask the server's operator: its encoder overflows" in sentence
    # Operators must notice, as it may be their encoder's fault.
    assert tiny.wait_for(
        lambda: store_metrics(server.metrics_url, 10)["sam3_failures_total"] == failures + 1, 10
    )
    assert sentence in server.read_log()


# Kept images.


@pytest.mark.semantic(
    "session", "an id that was never issued is answered NOT_FOUND", "the contract"
)
@pytest.mark.parametrize("unknown", ["", "unknown", b"\xff\xfe\x00", "é" * 50, "../../etc/passwd"])
def test_an_id_that_was_never_issued_is_not_found(served: Served, unknown: str | bytes) -> None:
    assert served.refused(DECODER, NOT_FOUND, **by_id(unknown), **clicks(1)) == (
        "image_id not found: it was never issued by this server or has been evicted; send the "
        "image again with keep_image"
    )


def test_one_unknown_id_of_a_batch(served: Served, image_id: str) -> None:
    ids = {"image_id": np.array([[image_id], ["unknown"]], np.object_)}
    served.refused(DECODER, NOT_FOUND, **ids, **clicks(1, images=2))


def test_an_image_is_kept_only_when_asked(served: Served, side: int) -> None:
    image = pictures(2, side)
    question = {**image, **clicks(1, images=2)}
    assert {id_of(served.ask(ENSEMBLE, **question), i) for i in range(2)} == {""}
    mixed = served.ask(ENSEMBLE, **question, keep_image=np.array([[False], [True]]))
    assert id_of(mixed, 0) == ""
    assert served.ask(DECODER, **by_id(id_of(mixed, 1)), **clicks(1))


def test_keeping_a_kept_image_is_free(served: Served, image_id: str) -> None:
    answer = served.ask(DECODER, **by_id(image_id), **clicks(1), keep_image=flag(True))
    assert id_of(answer) == image_id


def test_the_same_image_has_a_new_id_each_time(served: Served, side: int) -> None:
    question = {**pictures(1, side), **clicks(0), "keep_image": flag(True)}
    ids = {id_of(served.ask(ENSEMBLE, **question)) for _ in range(5)}
    assert len(ids) == 5
    assert all(re.fullmatch(r"[\w-]{22}", found) for found in ids)


def test_a_kept_image_outlives_the_memory_of_its_request(served: Served, side: int) -> None:
    """Triton reuses the shared memory of answered requests for later ones."""
    question = clicks(2)
    first = served.ask(ENSEMBLE, **pictures(1, side, 99), **question, keep_image=flag(True))
    for seed in range(12):
        served.ask(ENSEMBLE, **pictures(1 + seed % 3, side, seed), **clicks(3, 1, 1 + seed % 3))
    again = served.ask(DECODER, **by_id(id_of(first)), **question)
    alike(again["low_res_masks"], first["low_res_masks"])


@pytest.fixture
def region(server: TritonServer) -> Iterator[Any]:
    """A system shared memory region of one image's embeddings, registered with the server."""
    served = Served(server)
    dims = served.dims()
    size = sum(4 * int(np.prod(dims[name])) for name in FEATURES)
    name = "sam3_test_features"
    handle = shared_memory.create_shared_memory_region(name, f"/{name}", size)
    served.client.register_system_shared_memory(name, f"/{name}", size)
    yield handle
    served.client.unregister_system_shared_memory(name)
    shared_memory.destroy_shared_memory_region(handle)


def test_a_kept_image_outlives_the_callers_shared_memory(
    server: TritonServer, side: int, region: Any
) -> None:
    served = Served(server)
    features = served.ask(ENCODER, **pictures(1, side, 7))
    inputs, offset = [], 0
    for name in FEATURES:
        tensor = grpc.InferInput(name, list(features[name].shape), "FP32")
        tensor.set_shared_memory("sam3_test_features", features[name].nbytes, offset)
        shared_memory.set_shared_memory_region(region, [features[name]], offset)
        offset += features[name].nbytes
        inputs.append(tensor)
    question = served._inputs({**clicks(1), "keep_image": flag(True)})
    first = served._read(served.client.infer(DECODER, inputs + question))
    shared_memory.set_shared_memory_region(region, [np.full(offset // 4, 1e3, np.float32)])
    again = served.ask(DECODER, **by_id(id_of(first)), **clicks(1))
    alike(again["low_res_masks"], first["low_res_masks"])


@pytest.mark.semantic("session", "an evicted image is told from a bad prompt", "the contract")
def test_an_unknown_id_is_distinguished_from_an_invalid_prompt(
    served: Served, image_id: str
) -> None:
    bad = {**clicks(1), "point_labels": np.full((1, 1, 1), 9, np.int32)}
    served.refused(DECODER, NOT_FOUND, **by_id("unknown"), **bad)
    served.refused(DECODER, INVALID, **by_id(image_id), **bad)
