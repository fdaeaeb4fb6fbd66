"""Requests to served models, as made by a caller without the Python client."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from tritonclient import grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from triton_sam3 import Prompt, Segmentation
from triton_sam3.prompts import pack

Outputs = dict[str, NDArray[Any]]


class Ask(Protocol):
    """Send named arrays to a model; the answer's arrays by name."""

    def __call__(self, model: str, **arrays: NDArray[Any]) -> Outputs: ...


@contextmanager
def connect(address: str) -> Iterator[Ask]:
    """An `Ask` over gRPC, of HOST:PORT; usable from several threads."""
    with grpc.InferenceServerClient(address) as connection:

        def ask(model: str, **arrays: NDArray[Any]) -> Outputs:
            inputs = [_input(name, array) for name, array in arrays.items()]
            answer = connection.infer(model, inputs)
            names = [output.name for output in answer.get_response().outputs]
            return {name: answer.as_numpy(name) for name in names}

        yield ask


def _input(name: str, array: NDArray[Any]) -> Any:
    tensor = grpc.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    tensor.set_data_from_numpy(array)
    return tensor


def refusal(ask: Ask, model: str, **arrays: NDArray[Any]) -> str:
    """The sentence of an answer that must be INVALID_ARG."""
    with pytest.raises(InferenceServerException) as caught:
        ask(model, **arrays)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    return str(caught.value.message())


def file_inputs(data: bytes, prompts: Sequence[Prompt]) -> dict[str, NDArray[Any]]:
    """A file's bytes and prompts in its pixels, as sam3_image_reader takes them."""
    labels = pack(prompts, 1 << 20, 1 << 20, mask_side=0).point_labels
    points = np.zeros((*labels.shape, 2), np.float32)
    for row, prompt in zip(points, prompts, strict=True):
        box = [prompt.box[:2], prompt.box[2:]] if prompt.box else []
        tokens = [*box, *((point.x, point.y) for point in prompt.points)]
        row[: len(tokens)] = tokens
    file = np.array([[data]], np.object_)
    return {"encoded_image": file, "points": points[None], "point_labels": labels[None]}


def decoded(outputs: Outputs, image: int = 0) -> NDArray[np.bool_]:
    """The masks [N, H, W] of one image of an answer."""
    masks = [coco_mask.decode(json.loads(text)) for text in outputs["masks"][image]]
    return np.array(masks, np.bool_)


def assert_same(outputs: Outputs, expected: Segmentation, image: int = 0) -> None:
    """Assert that one image's finished masks are the Python client's, bit for bit."""
    np.testing.assert_array_equal(decoded(outputs, image), expected.masks)
    np.testing.assert_array_equal(outputs["scores"][image], expected.scores)
    np.testing.assert_array_equal(outputs["boxes"][image], expected.boxes)


def assert_alike(outputs: Outputs, expected: Segmentation, image: int = 0) -> None:
    """`assert_same` for images computed in a batch, whose sums may round differently."""
    differing = decoded(outputs, image) ^ expected.masks
    assert differing.mean() < 1e-3
    np.testing.assert_allclose(outputs["scores"][image], expected.scores, atol=1e-4)
