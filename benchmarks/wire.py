"""Requests without the client library around them, to measure the server alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import tritonclient.grpc as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from triton_sam3 import contract

FEATURES = ("image_embed", "high_res_feats_0", "high_res_feats_1")
MASKS = (contract.LOW_RES_MASKS.name, contract.IOU_PREDICTIONS.name)


def tensor(name: str, array: NDArray[Any]) -> triton.InferInput:
    """Wrap an array as a request's input."""
    value = triton.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
    value.set_data_from_numpy(array)
    return value


def click_inputs(x: float = 0.5, y: float = 0.5, objects: int = 1) -> dict[str, NDArray[Any]]:
    """One positive point, in fractions, for each of the objects; the best of three masks."""
    return {
        contract.POINT_COORDS.name: np.full((1, objects, 1, 2), (x, y), np.float32),
        contract.POINT_LABELS.name: np.ones((1, objects, 1), np.int32),
        contract.BEST_ONLY.name: np.ones((1, 1), np.bool_),
    }


class Wire:
    """The served models over gRPC."""

    def __init__(self, url: str) -> None:
        self._client = triton.InferenceServerClient(url.removeprefix("grpc://"))
        config = self._client.get_model_config(contract.ENCODER).config
        self.side = int(config.input[0].dims[0])

    def encode(self, images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """[B, S, S, 3] → the three embeddings."""
        return self._infer(contract.ENCODER, {contract.IMAGE.name: images}, FEATURES)

    def keep(self, image: NDArray[np.uint8]) -> NDArray[Any]:
        """[S, S, 3] → image_id [1, 1]."""
        inputs = {
            contract.IMAGE.name: image[None],
            contract.KEEP_IMAGE.name: np.ones((1, 1), np.bool_),
            **click_inputs(),
        }
        name = contract.IMAGE_ID.name
        return self._infer(contract.INTERACTIVE, inputs, (name,))[name]

    def click(self, image: dict[str, NDArray[Any]], **prompt: Any) -> dict[str, NDArray[Any]]:
        """Masks and scores for an image given by its id or its embeddings."""
        return self._infer(contract.DECODER, {**image, **click_inputs(**prompt)}, MASKS)

    def rejected_click(self) -> None:
        """Click on an image that is not kept: a round trip with nothing decoded."""
        nobody = {contract.IMAGE_ID.name: np.array([["nobody's"]], np.object_)}
        try:
            self.click(nobody)
        except InferenceServerException:
            return
        raise RuntimeError("a click on an image that is not kept was answered")

    def close(self) -> None:
        self._client.close()

    def _infer(
        self, model: str, inputs: dict[str, NDArray[Any]], outputs: tuple[str, ...]
    ) -> dict[str, NDArray[Any]]:
        answer = self._client.infer(
            model,
            [tensor(name, array) for name, array in inputs.items()],
            outputs=[triton.InferRequestedOutput(name) for name in outputs],
        )
        return {name: answer.as_numpy(name) for name in outputs}
