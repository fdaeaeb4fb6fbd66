"""sam3_mask_writer: what it rejects, and edge-case shapes. For its masks see test_thin_clients."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from server import TritonServer
from tests.model_repository.asking import Ask, connect, decoded, refusal
from tests.server import tiny
from triton_sam3 import Client

WRITER = "sam3_mask_writer"


@pytest.fixture(scope="module")
def foreground(client: Client) -> dict[str, NDArray[Any]]:
    """An answer of one object, three candidates, foreground everywhere."""
    served = client.status().served
    assert served is not None
    shape = (1, 1, 3, served.mask_side, served.mask_side)
    scores = np.array([[[0.2, 0.9, 0.4]]], np.float32)
    return {"low_res_masks": np.ones(shape, np.float16), "iou_predictions": scores}


def size(width: int, height: int) -> NDArray[np.int32]:
    return np.array([[width, height]], np.int32)


def test_the_candidate_with_the_best_score_is_written(
    ask: Ask, foreground: dict[str, NDArray[Any]]
) -> None:
    logits = foreground["low_res_masks"].copy()
    logits[:, :, [0, 2]] = -1
    answer = ask(WRITER, **{**foreground, "low_res_masks": logits}, image_size=size(30, 20))
    assert decoded(answer).shape == (1, 20, 30)
    assert decoded(answer).all()
    np.testing.assert_array_equal(answer["scores"], np.array([[0.9]], np.float32))
    np.testing.assert_array_equal(answer["boxes"], [[[0, 0, 30, 20]]])


@pytest.mark.parametrize("wrong", [(0, 5), (5, -1), (40_000, 40_000), (1, 65_536), (2**31 - 1, 1)])
def test_an_impossible_image_size_is_rejected(
    wrong: tuple[int, int], ask: Ask, foreground: dict[str, NDArray[Any]]
) -> None:
    sentence = refusal(ask, WRITER, **foreground, image_size=size(*wrong))
    assert f"image_size is {wrong[0]}×{wrong[1]}; expected width and height" in sentence


def test_too_many_pixels_in_one_request_are_rejected(
    ask: Ask, foreground: dict[str, NDArray[Any]]
) -> None:
    """Many masks of a size that is accepted alone: the writer could not be stopped."""
    many = {name: np.repeat(array, 128, axis=1) for name, array in foreground.items()}
    sentence = refusal(ask, WRITER, **many, image_size=size(7_000, 7_000))
    assert "128 masks of each image would have 6272000000 pixels in all" in sentence


def test_logits_and_scores_of_different_answers_are_rejected(
    ask: Ask, foreground: dict[str, NDArray[Any]]
) -> None:
    other = {**foreground, "iou_predictions": foreground["iou_predictions"][..., :2]}
    assert "expected [B, N, K, M, M]" in refusal(ask, WRITER, **other, image_size=size(30, 20))


def test_an_image_wider_than_opencv_counts_in_16_bits(
    ask: Ask, foreground: dict[str, NDArray[Any]]
) -> None:
    answer = ask(WRITER, **foreground, image_size=size(50_000, 3))
    assert decoded(answer).shape == (1, 3, 50_000)
    assert decoded(answer).all()


def test_no_objects_give_no_masks(ask: Ask, foreground: dict[str, NDArray[Any]]) -> None:
    none = {name: array[:, :0] for name, array in foreground.items()}
    answer = ask(WRITER, **none, image_size=size(30, 20))
    shapes = {name: array.shape for name, array in answer.items()}
    assert shapes == {"masks": (1, 0), "scores": (1, 0), "boxes": (1, 0, 4)}


def test_the_pixels_of_all_images_of_a_batch_count(
    ask: Ask, foreground: dict[str, NDArray[Any]]
) -> None:
    many = {name: np.tile(a, (8, 16, *[1] * (a.ndim - 2))) for name, a in foreground.items()}
    sentence = refusal(ask, WRITER, **many, image_size=np.repeat(size(7_000, 7_000), 8, axis=0))
    assert "16 masks of each image would have 6272000000 pixels in all" in sentence


def test_finished_masks_of_both_instances_are_counted(
    ask: Ask, foreground: dict[str, NDArray[Any]], server: TritonServer
) -> None:
    """In one series, which the liveness probe reads; a request of several masks counts each."""

    def written() -> list[float]:
        series = re.findall(
            r"^sam3_masks_written_total\{.*\} (\S+)$", tiny.get(server.metrics_url), re.M
        )
        return [float(value) for value in series]

    (before,) = written()
    pair = {name: np.repeat(array, 2, axis=1) for name, array in foreground.items()}
    for _ in range(6):
        ask(WRITER, **pair, image_size=size(30, 20))
    assert tiny.wait_for(lambda: written() == [before + 12], 10), written()


def test_masks_that_take_too_many_bytes_are_rejected(
    repository: Path, foreground: dict[str, NDArray[Any]], tmp_path: Path
) -> None:
    """Stripes across every column, as a shape that was made for it has them."""
    shutil.copytree(repository / WRITER, tmp_path / WRITER)
    config = tmp_path / WRITER / "config.pbtxt"
    config.write_text(config.read_text().replace('"268435456"', '"50000"'))
    stripes = {**foreground, "low_res_masks": foreground["low_res_masks"].copy()}
    stripes["low_res_masks"][..., ::2, :] = -1
    two_objects = {name: np.repeat(array, 2, axis=1) for name, array in stripes.items()}
    two_images = {name: np.repeat(array, 2, axis=0) for name, array in stripes.items()}
    with (
        TritonServer(tmp_path) as server,
        connect(server.grpc_url.removeprefix("grpc://")) as ask_small,
    ):
        one = ask_small(WRITER, **stripes, image_size=size(300, 200))["masks"].item()
        assert 25_000 < len(one) < 50_000
        for inputs, images in ((two_objects, 1), (two_images, 2)):
            sizes = np.repeat(size(300, 200), images, axis=0)
            sentence = refusal(ask_small, WRITER, **inputs, image_size=sizes)
            assert "at most 50000 bytes as RLE" in sentence
