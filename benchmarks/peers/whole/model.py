"""The Triton model `sam3_whole`: Meta's predictor behind one model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from benchmarks.reference import timed_predictor


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        checkpoint = Path(parameters["checkpoint"]["string_value"])
        self._predictor = timed_predictor(checkpoint, parameters["device"]["string_value"])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        image = pb_utils.get_input_tensor_by_name(request, "image")
        if image is not None:
            self._predictor.set_image(image.as_numpy())
        masks, scores, _ = self._predictor.predict(
            pb_utils.get_input_tensor_by_name(request, "point_coords").as_numpy(),
            pb_utils.get_input_tensor_by_name(request, "point_labels").as_numpy(),
        )
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor("masks", masks > 0), pb_utils.Tensor("scores", scores)]
        )
