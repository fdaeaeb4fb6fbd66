"""The ensembles for callers without Python: their masks are the client's, bit for bit."""

from __future__ import annotations

import base64
import io
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tritonclient.utils import InferenceServerException

from server import TritonServer
from tests.model_repository.asking import (
    Ask,
    assert_alike,
    assert_same,
    decoded,
    file_inputs,
    refusal,
)
from triton_sam3 import Client, Prompt
from triton_sam3.geometry import load_image, resize
from triton_sam3.prompts import pack

RLE, FILE, CLICK = "sam3_interactive_rle", "sam3_interactive_file", "sam3_click_rle"

PROMPTS = {
    "a point": [Prompt(points=[(200, 150)])],
    "points": [Prompt(points=[(200, 150), (100, 80, False), (220.5, 170.25)])],
    "a box": [Prompt(box=(100, 60, 300, 240))],
    "a box and points": [Prompt(points=[(200, 150), (110, 70, False)], box=(100, 60, 300, 240))],
    "a box that overshoots": [Prompt(box=(-20, 60, 9000, 240))],
    "objects of several lengths": [
        Prompt(box=(100, 60, 300, 240)),
        Prompt(points=[(200, 150), (100, 80, False), (220, 170), (1, 1, False)]),
        Prompt(points=[(40.5, 30.25)]),
    ],
}
SIZE = (600, 400)
"""Width and height of the photo."""

each_prompt = pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)


def flag(value: bool) -> NDArray[np.bool_]:
    return np.array([[value]])


def prompt_inputs(prompts: list[Prompt], mask_side: int = 0) -> dict[str, NDArray[Any]]:
    """Prompts on the photo and its size."""
    packed = pack(prompts, *SIZE, mask_side)
    inputs = {
        "image_size": np.array([SIZE], np.int32),
        "point_coords": packed.point_coords[None],
        "point_labels": packed.point_labels[None],
    }
    return (
        inputs if packed.mask_input is None else {**inputs, "mask_input": packed.mask_input[None]}
    )


@pytest.fixture(scope="module")
def stretched(photo: Path, image_side: int) -> NDArray[np.uint8]:
    """The photo as the encoder takes it, [1, S, S, 3]."""
    return resize(load_image(photo), image_side)[None]


@pytest.mark.semantic(
    "thin clients", "finished masks from the server are the Python client's", "equality"
)
@each_prompt
@pytest.mark.parametrize("multimask", [True, False])
def test_pixels_give_finished_masks(
    prompts: list[Prompt],
    multimask: bool,
    ask: Ask,
    client: Client,
    photo: Path,
    stretched: NDArray[np.uint8],
) -> None:
    expected = client.segment(photo, prompts=prompts, multimask_output=multimask)
    inputs = {**prompt_inputs(prompts), "image": stretched, "multimask_output": flag(multimask)}
    assert expected.masks.any()
    assert_same(ask(RLE, **inputs), expected)
    assert_same(ask(RLE, **inputs, best_only=flag(True)), expected)


def test_an_earlier_mask_is_refined(
    ask: Ask, client: Client, photo: Path, stretched: NDArray[np.uint8]
) -> None:
    first = client.segment(photo, points=[(200, 150)])
    refined = [Prompt(points=[(200, 150), (100, 80, False)], mask=first.logits[0])]
    inputs = prompt_inputs(refined, first.logits.shape[-1])
    assert "mask_input" in inputs
    assert_same(ask(RLE, **inputs, image=stretched), client.segment(photo, prompts=refined))


@pytest.mark.semantic(
    "thin clients", "finished masks of an image file are the Python client's", "equality"
)
@each_prompt
def test_a_file_gives_finished_masks(
    prompts: list[Prompt], ask: Ask, client: Client, photo: Path
) -> None:
    answer = ask(FILE, **file_inputs(photo.read_bytes(), prompts))
    assert_same(answer, client.segment(photo, prompts=prompts))
    assert answer["image_size"].tolist() == [[*SIZE]]
    assert answer["image_id"].tolist() == [[b""]]


def test_a_file_gives_one_mask_per_object(ask: Ask, client: Client, photo: Path) -> None:
    prompts = PROMPTS["points"]
    expected = client.segment(photo, prompts=prompts, multimask_output=False)
    inputs = file_inputs(photo.read_bytes(), prompts)
    assert_same(ask(FILE, **inputs, multimask_output=flag(False)), expected)


def test_two_files_in_one_request(ask: Ask, client: Client, photo: Path, tmp_path: Path) -> None:
    other = tmp_path / "turned.png"
    Image.open(photo).transpose(Image.Transpose.ROTATE_90).resize((301, 77)).save(other)
    prompts = [Prompt(points=[(40, 30)]), Prompt(box=(5, 5, 60, 70))]
    both = [file_inputs(path.read_bytes(), prompts) for path in (photo, other)]
    answer = ask(FILE, **{name: np.concatenate([one[name] for one in both]) for name in both[0]})
    assert_alike(answer, client.segment(photo, prompts=prompts), image=0)
    assert_alike(answer, client.segment(other, prompts=prompts), image=1)
    assert answer["image_size"].tolist() == [[*SIZE], [301, 77]]


@pytest.mark.semantic(
    "thin clients", "finished masks of later clicks are the Python client's", "equality"
)
@each_prompt
def test_later_clicks_name_the_kept_image(
    prompts: list[Prompt], ask: Ask, client: Client, photo: Path
) -> None:
    first = ask(FILE, **file_inputs(photo.read_bytes(), prompts), keep_image=flag(True))
    inputs = {**prompt_inputs(prompts), "image_size": first["image_size"]}
    answer = ask(CLICK, **inputs, image_id=first["image_id"])
    assert_same(answer, client.segment(photo, prompts=prompts))


def test_an_evicted_image_is_not_found(ask: Ask) -> None:
    with pytest.raises(InferenceServerException) as caught:
        ask(
            CLICK,
            **prompt_inputs([Prompt(points=[(1, 1)])]),
            image_id=np.array([[b"nobody's"]], np.object_),
        )
    assert caught.value.status() == "StatusCode.NOT_FOUND"
    assert "send the image again with keep_image" in str(caught.value.message())


def test_bad_requests_beside_good_ones(ask: Ask, client: Client, photo: Path) -> None:
    """At once, so that they meet in queues and batches."""
    prompts = PROMPTS["a point"]
    expected = client.segment(photo, prompts=prompts)
    good = file_inputs(photo.read_bytes(), prompts)
    bad = [
        {**good, "encoded_image": np.array([[b"\x89PNG\r\n\x1a\n and no more"]], np.object_)},
        {**good, "points": good["points"] + 1000},
        {**good, "point_labels": good["point_labels"] + 7},
    ]
    with ThreadPoolExecutor(8) as threads:
        answers = [threads.submit(ask, FILE, **good) for _ in range(6)]
        refusals = [threads.submit(refusal, ask, FILE, **wrong) for wrong in bad * 2]
        for answer in answers:
            assert_alike(answer.result(), expected)
        sentences = [sentence.result() for sentence in refusals]
    for sentence, words in zip(
        sentences, ("whole file", "in pixels", "point_labels") * 2, strict=True
    ):
        assert words in sentence


def curl(url: str, body: str) -> tuple[int, dict[str, Any]]:
    """POST with curl; return status and answer."""
    command = ["curl", "--silent", "--write-out", "\n%{http_code}"]
    command += ["--header", "Content-Type: application/json", "--data", "@-", url]
    done = subprocess.run(command, input=body, capture_output=True, text=True, check=True)
    answer, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(answer)


def request_body(data: str, x: float, y: float) -> str:
    inputs = [
        {"name": "encoded_image", "datatype": "BYTES", "shape": [1, 1], "data": [data]},
        {"name": "points", "datatype": "FP32", "shape": [1, 1, 1, 2], "data": [x, y]},
        {"name": "point_labels", "datatype": "INT32", "shape": [1, 1, 1], "data": [1]},
    ]
    return json.dumps({"inputs": inputs})


def test_curl(server: TritonServer, client: Client, photo: Path) -> None:
    url = f"{server.http_url}/v2/models/{FILE}/infer"
    encoded = base64.b64encode(photo.read_bytes()).decode()
    status, answer = curl(url, request_body(encoded, 200, 150))
    assert status == 200
    outputs = {
        output["name"]: np.array(output["data"]).reshape(output["shape"])
        for output in answer["outputs"]
    }
    expected = client.segment(photo, points=[(200, 150)])
    np.testing.assert_array_equal(decoded(outputs), expected.masks)
    np.testing.assert_array_equal(outputs["boxes"][0], expected.boxes)
    assert outputs["scores"][0].astype(np.float32) == expected.scores
    assert outputs["image_size"].tolist() == [[*SIZE]]


def test_curl_with_a_photo_of_megabytes(server: TritonServer) -> None:
    """Above the 8 MB that Triton 2.51 would accept if curl sent it as a form."""
    noise = np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG", compress_level=0)
    encoded = base64.b64encode(file.getvalue()).decode()
    assert len(encoded) > 10 * 2**20
    url = f"{server.http_url}/v2/models/{FILE}/infer"
    assert curl(url, request_body(encoded, 1000, 750))[0] == 200


def test_curl_shows_what_is_wrong(server: TritonServer, photo: Path) -> None:
    url = f"{server.http_url}/v2/models/{FILE}/infer"
    status, answer = curl(url, request_body("photo.jpg", 200, 150))
    assert status == 400
    assert "base64" in answer["error"]
    encoded = base64.b64encode(photo.read_bytes()).decode()
    status, answer = curl(url, request_body(encoded, 601, 150))
    assert status == 400
    assert "(601, 150); x must be within 0…600 and y within 0…400" in answer["error"]
