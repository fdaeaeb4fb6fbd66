"""Triton's side of the image reader: requests to arrays, arrays to responses.

    encoded_image ─► files.FileReader ─► RGB [H, W, 3] ─┬─► resize ─────► image [S, S, 3]
    points ───────────────────────────────────────────┐ ├───────────────► image_size
                                     pixels.to_coords ◄─┘ ──────────────► point_coords

`sam3_shared` is written by the export: copies of the client's own modules that load and resize, so
a file gives the same pixels on either side.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from files import FileReader, InvalidFile, Limits
from numpy.typing import NDArray
from pixels import InvalidPoint, to_coords
from sam3_shared.geometry import resize

FAILURES = "sam3_failures_total"
"""In one family with the decoder's and the mask writer's, which must describe it alike."""
FAILED = "the image reader failed on this request; the server's log says why"


class TritonPythonModel:
    """One instance of sam3_image_reader."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        parameters = {k: v["string_value"] for k, v in config["parameters"].items()}
        sizes = {tensor["name"]: tensor["dims"] for tensor in config["output"]}
        self._side = int(sizes["image"][0])
        self._reader = FileReader(
            Limits(
                formats=tuple(name.strip() for name in parameters["formats"].split(",")),
                max_bytes=int(parameters["max_bytes"]),
                max_pixels=int(parameters["max_pixels"]),
                max_side=int(parameters["max_side"]),
                max_frames=int(parameters["max_frames"]),
            )
        )
        self._family = pb_utils.MetricFamily(
            name=FAILURES,
            description="Valid requests that failed",
            kind=pb_utils.MetricFamily.COUNTER,
        )
        labels = {"model": args["model_name"], "version": args["model_version"]}
        self._failures = self._family.Metric(labels=labels)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer every request separately: a bad one gets an error, the others get their images."""
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        """Remove the metric before Triton ends the process."""
        del self._failures  # must be deleted before its family
        del self._family

    def _answer(self, request: Any) -> Any:
        try:
            rows = self._read_batch(request)
        except (InvalidFile, InvalidPoint) as error:
            return _error_response(str(error), pb_utils.TritonError.INVALID_ARG)
        except Exception:
            pb_utils.Logger.log_error(traceback.format_exc())
            with suppress(Exception):  # Triton has exception types of its own
                self._failures.increment(1)
            return _error_response(FAILED, pb_utils.TritonError.INTERNAL)
        names = ("image", "point_coords", "image_size")
        columns = zip(names, zip(*rows, strict=True), strict=True)
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, np.stack(column)) for name, column in columns]
        )

    def _read_batch(self, request: Any) -> list[tuple[NDArray[Any], ...]]:
        """The outputs' rows, one for each image. Raises InvalidFile or InvalidPoint."""
        files, points, labels = (
            pb_utils.get_input_tensor_by_name(request, name).as_numpy()
            for name in ("encoded_image", "points", "point_labels")
        )
        rows = []
        for b, row in enumerate(zip(files.ravel(), points, labels, strict=True)):
            try:
                rows.append(self._read(*row))
            except (InvalidFile, InvalidPoint) as error:
                where = f" (image {b} of the request)" if len(files) > 1 else ""
                raise type(error)(f"{error}{where}") from error
        return rows

    def _read(
        self, file: bytes, points: NDArray[np.float32], labels: NDArray[np.int32]
    ) -> tuple[NDArray[Any], ...]:
        """image, point_coords and image_size of one image."""
        pixels = self._reader.read(file)
        height, width = pixels.shape[:2]
        coords = to_coords(points, labels, width, height)
        return resize(pixels, self._side), coords, np.array([width, height], np.int32)


def _error_response(message: str, code: int) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
