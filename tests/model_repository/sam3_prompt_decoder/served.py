"""Requests to the served models over both protocols, one by one or many at once."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tritonclient import grpc, http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from server import TritonServer

ENCODER, DECODER, ENSEMBLE = "sam3_image_encoder", "sam3_prompt_decoder", "sam3_interactive"
FEATURES = ("image_embed", "high_res_feats_0", "high_res_feats_1")
INVALID, NOT_FOUND = "invalid", "not found"
CODES = {
    INVALID: ("StatusCode.INVALID_ARGUMENT", "400"),
    NOT_FOUND: ("StatusCode.NOT_FOUND", "404"),
}

Array = NDArray[Any]
Arrays = Mapping[str, Array]


@dataclass
class Served:
    """One server, over gRPC or HTTP."""

    server: TritonServer
    protocol: str = "grpc"
    _library: Any = field(init=False)

    def __post_init__(self) -> None:
        self._library = {"grpc": grpc, "http": http}[self.protocol]
        url = self.server.grpc_url if self.protocol == "grpc" else self.server.http_url
        self.client: Any = self._library.InferenceServerClient(url.partition("://")[2])

    def ask(self, model: str, /, **arrays: Array) -> dict[str, Array]:
        """The answer's arrays by name."""
        return self._read(self.client.infer(model, self._inputs(arrays)))

    def refused(self, model: str, code: str = INVALID, /, **arrays: Array) -> str:
        """The message for a request that must be rejected with this code."""
        with pytest.raises(InferenceServerException) as caught:
            self.ask(model, **arrays)
        assert caught.value.status() == CODES[code][self.protocol == "http"]
        return str(caught.value.message())

    def send(self, model: str, requests: Sequence[Arrays]) -> list[Future[Any]]:
        """Futures of answers or exceptions, for requests that do not wait for each other (gRPC)."""
        futures: list[Future[Any]] = [Future() for _ in requests]

        def receive(future: Future[Any], result: Any, error: Any) -> None:
            future.set_result(error if error else self._read(result))

        for future, arrays in zip(futures, requests, strict=True):
            self.client.async_infer(
                model,
                self._inputs(arrays),
                lambda result, error, future=future: receive(future, result, error),
            )
        return futures

    def wait_for_queue(self, requests: int, seconds: float = 0.7) -> None:
        """Wait until this many requests are queued for the decoder, but not for long."""
        until = time.monotonic() + seconds
        while self.metric("nv_inference_pending_request_count") < requests:
            if time.monotonic() > until:
                return
            time.sleep(0.01)

    def config(self, model: str) -> dict[str, Any]:
        answer = self.client.get_model_config(model, **self._json)
        config: dict[str, Any] = answer.get("config", answer)
        return config

    def metadata(self, model: str) -> dict[str, Any]:
        answer: dict[str, Any] = self.client.get_model_metadata(model, **self._json)
        return answer

    def dims(self, model: str = DECODER) -> dict[str, list[int]]:
        """The dims of every input, without the batch."""
        return {t["name"]: [int(d) for d in t["dims"]] for t in self.config(model)["input"]}

    def metric(self, name: str, labels: str = f'{{model="{DECODER}",version="1"}}') -> float:
        """One value from the metrics endpoint; NaN if it is missing."""
        with urllib.request.urlopen(self.server.metrics_url) as answer:
            lines = answer.read().decode().splitlines()
        values = [line.split()[-1] for line in lines if line.startswith(name + labels + " ")]
        return float(values[0]) if values else float("nan")

    @property
    def _json(self) -> dict[str, bool]:
        return {"as_json": True} if self.protocol == "grpc" else {}

    def _inputs(self, arrays: Arrays) -> list[Any]:
        inputs = []
        for name, array in arrays.items():
            kind = np_to_triton_dtype(array.dtype)
            tensor = self._library.InferInput(name, list(array.shape), kind)
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)
        return inputs

    def _read(self, result: Any) -> dict[str, Array]:
        response = result.get_response()
        names = (
            [output["name"] for output in response["outputs"]]
            if isinstance(response, dict)
            else [output.name for output in response.outputs]
        )
        return {name: result.as_numpy(name) for name in names}


def clicks(objects: int, tokens: int = 1, images: int = 1, seed: int = 0) -> dict[str, Array]:
    """Positive points, each at a different place."""
    rng = np.random.default_rng(seed)
    return {
        "point_coords": rng.random((images, objects, tokens, 2), dtype=np.float32),
        "point_labels": np.ones((images, objects, tokens), np.int32),
    }


def flag(value: bool, images: int = 1) -> Array:
    return np.full((images, 1), value)


def by_id(image_id: str | bytes) -> dict[str, Array]:
    return {"image_id": np.array([[image_id]], np.object_)}


def id_of(answer: Arrays, image: int = 0) -> str:
    found = answer["image_id"][image, 0]
    return found.decode() if isinstance(found, bytes) else str(found)


def alike(ours: Array, theirs: Array) -> None:
    """Equal except for the order of sums and FP16's last bits."""
    np.testing.assert_allclose(
        ours.astype(np.float32), theirs.astype(np.float32), rtol=5e-3, atol=5e-3
    )
