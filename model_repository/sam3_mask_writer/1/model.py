"""Triton's side of the mask writer: logits to COCO RLE at the image's size.

    low_res_masks, iou_predictions ─► best candidate ─► filled, upsampled, > 0 ─► RLE, box
    image_size ─────────────────────────────────────────────┘

`sam3_shared` is written by the export: copies of the client's own modules that finish and encode
masks, so logits give the same mask on either side.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray
from sam3_shared.formats import mask_to_rle
from sam3_shared.masks import finish_masks, mask_boxes

WRITTEN = "sam3_masks_written_total"
FAILURES = "sam3_failures_total"
"""In one family with the decoder's and the image reader's, which must describe it alike."""
FAILED = "the mask writer failed on this request; the server's log says why"


class InvalidRequest(ValueError):
    """Sizes, candidates or masks are not accepted; the message is the answer to the caller."""


class Finished(NamedTuple):
    """The masks of one image."""

    masks: NDArray[np.object_]
    """[N], JSON of {"size": [height, width], "counts": str}"""
    scores: NDArray[np.float32]
    """[N]"""
    boxes: NDArray[np.float32]
    """[N, 4]"""


class TritonPythonModel:
    """One instance of sam3_mask_writer."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        parameters = {k: int(v["string_value"]) for k, v in config["parameters"].items()}
        self._max_pixels, self._max_side = parameters["max_pixels"], parameters["max_side"]
        self._max_mask_pixels = parameters["max_mask_pixels"]
        self._max_answer_bytes = parameters["max_answer_bytes"]
        labels = {"model": args["model_name"], "version": args["model_version"]}
        described = {WRITTEN: "Masks finished", FAILURES: "Valid requests that failed"}
        self._families = [
            pb_utils.MetricFamily(name=name, description=text, kind=pb_utils.MetricFamily.COUNTER)
            for name, text in described.items()
        ]
        self._written, self._failures = (family.Metric(labels=labels) for family in self._families)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer every request separately: a bad one gets an error, the others get their masks."""
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        """Remove the metrics before Triton ends the process."""
        del self._written, self._failures  # must be deleted before their families
        del self._families

    def _answer(self, request: Any) -> Any:
        try:
            columns = self._write(request)
        except InvalidRequest as error:
            return _error_response(str(error), pb_utils.TritonError.INVALID_ARG)
        except Exception:
            pb_utils.Logger.log_error(traceback.format_exc())
            _count(self._failures)
            return _error_response(FAILED, pb_utils.TritonError.INTERNAL)
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, np.stack(column)) for name, column in columns.items()]
        )

    def _write(self, request: Any) -> dict[str, tuple[NDArray[Any], ...]]:
        """The outputs by name, one for each image of the batch. Raises InvalidRequest."""
        logits, ious, sizes = (
            pb_utils.get_input_tensor_by_name(request, name).as_numpy()
            for name in ("low_res_masks", "iou_predictions", "image_size")
        )
        _check_candidates(logits, ious)
        for width, height in sizes.tolist():
            self._check_size(width, height)
        self._check_work(logits.shape[1], sizes)
        images, left = [], self._max_answer_bytes
        for row in zip(logits, ious, sizes.tolist(), strict=True):
            images.append(self._finish(*row, left))
            left -= sum(map(len, images[-1].masks))
        return dict(zip(Finished._fields, zip(*images, strict=True), strict=True))

    def _check_size(self, width: int, height: int) -> None:
        sides_fit = 0 < width <= self._max_side and 0 < height <= self._max_side
        if not (sides_fit and width * height <= self._max_pixels):
            raise InvalidRequest(
                f"image_size is {width}×{height}; expected width and height of the image in "
                f"pixels, each at most {self._max_side} and their product at most "
                f"{self._max_pixels}"
            )

    def _check_work(self, objects: int, sizes: NDArray[np.int32]) -> None:
        pixels = objects * sum(width * height for width, height in sizes.tolist())
        if pixels > self._max_mask_pixels:
            raise InvalidRequest(
                f"{objects} masks of each image would have {pixels} pixels in all, but one request "
                f"may ask for at most {self._max_mask_pixels}: ask for fewer objects at a time, "
                "or send a smaller image"
            )

    def _finish(
        self,
        logits: NDArray[np.float16],
        ious: NDArray[np.float32],
        size: list[int],
        max_bytes: int,
    ) -> Finished:
        """The best candidates [N, M, M] of [N, K, M, M], at width × height."""
        best = ious.argmax(axis=1)
        rows = np.arange(len(best))
        finished = Finished(
            np.empty(len(best), np.object_),
            ious[rows, best],
            np.empty((len(best), 4), np.float32),
        )
        for n, k in enumerate(best):  # one at a time: many masks at full size take a lot of memory
            mask = finish_masks(logits[n, k][None], *size)
            finished.masks[n] = json.dumps(mask_to_rle(mask[0])).encode()
            max_bytes -= len(finished.masks[n])
            if max_bytes < 0:
                raise InvalidRequest(
                    f"the masks of one request may take at most {self._max_answer_bytes} bytes as "
                    "RLE, but these take more: ask for fewer objects at a time, or send a smaller "
                    "image"
                )
            finished.boxes[n] = mask_boxes(mask)[0]
            # Shows probes that the writer is at work: a request for many large masks takes longer
            # than a probe waits, and Triton counts it only once it is answered.
            _count(self._written)
        return finished


def _count(metric: Any) -> None:
    with suppress(Exception):  # Triton has exception types of its own, as for a full /dev/shm
        metric.increment(1)


def _check_candidates(logits: NDArray[np.float16], ious: NDArray[np.float32]) -> None:
    if ious.shape != logits.shape[:3] or ious.shape[-1] == 0:
        raise InvalidRequest(
            f"low_res_masks has shape {list(logits.shape)} and iou_predictions {list(ious.shape)}; "
            "expected [B, N, K, M, M] and [B, N, K] with K of at least 1, both from one answer"
        )


def _error_response(message: str, code: int) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
