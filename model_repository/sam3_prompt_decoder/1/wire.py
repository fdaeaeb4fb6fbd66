"""Turns requests into jobs and masks into responses: the wire contract on Triton's tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils
from jobs import Job, Masks
from numpy.typing import NDArray
from prompts import InvalidPrompt, Limits, check_objects, parse_prompts
from store import Features, ImageStore
from torch import Tensor
from torch.utils.dlpack import from_dlpack


class InvalidEmbeddings(ValueError):
    """Embeddings give no valid masks; the message is the answer to the caller."""


@dataclass(frozen=True)
class ParsedRequest:
    """One valid request: a job for each image of its batch, and whether to keep that image."""

    jobs: list[Job]
    image_ids: list[str]
    """Ids of images that are already kept; empty strings for embeddings."""
    keep_image: list[bool]
    outputs: Collection[str]
    """Names of the requested outputs."""

    @property
    def objects(self) -> int:
        return sum(len(job.objects) for job in self.jobs)


class RequestTensors:
    """The tensors of one request, by name."""

    def __init__(self, request: Any) -> None:
        self._inputs = {tensor.name(): tensor for tensor in request.inputs()}
        self.outputs: Collection[str] = request.requested_output_names()

    def tensor(self, name: str) -> Tensor | None:
        """An input on its own device, without a copy."""
        tensor = self._inputs.get(name)
        return None if tensor is None else from_dlpack(tensor.to_dlpack())

    def array(self, name: str) -> NDArray[Any] | None:
        """A small input in host memory."""
        tensor = self._inputs.get(name)
        if tensor is None:
            return None
        on_host = tensor.is_cpu()
        return np.asarray(tensor.as_numpy() if on_host else from_dlpack(tensor.to_dlpack()).cpu())

    def flags(self, name: str, images: int, *, default: bool) -> list[bool]:
        """A boolean input for each image of the batch."""
        values = self.array(name)
        return [default] * images if values is None else [bool(value) for value in values.ravel()]


def parse_request(
    inputs: RequestTensors, store: ImageStore, limits: Limits, device: torch.device
) -> ParsedRequest:
    """Parse and check one request.

    Raises `InvalidPrompt`, `ImageNotKept` and `StoreTooSmall`, whose messages are the answer.
    """
    image_ids, images = _read_images(inputs, store, device)
    keep_image = inputs.flags("keep_image", len(images), default=False)
    if store.max_bytes:
        rows = zip(images, image_ids, keep_image, strict=True)
        store.check_size([image for image, image_id, keep in rows if keep and not image_id])
    jobs = _read_jobs(inputs, images, limits)
    return ParsedRequest(jobs, image_ids, keep_image, inputs.outputs)


def _read_images(
    inputs: RequestTensors, store: ImageStore, device: torch.device
) -> tuple[list[str], list[Features]]:
    """Ids and embeddings of a request's images, from the encoder or kept from an earlier call."""
    tensors = [inputs.tensor(name) for name in Features._fields]
    present = [tensor.to(device) for tensor in tensors if tensor is not None]
    given_ids = inputs.array("image_id")
    if given_ids is not None and not present:
        # No id has the replacement character, so bytes that are not UTF-8 are not found either.
        image_ids = [image_id.decode(errors="replace") for image_id in given_ids.ravel()]
        return image_ids, [store.get(image_id) for image_id in image_ids]
    if given_ids is None and len(present) == len(tensors):
        images = [Features(*rows) for rows in zip(*present, strict=True)]
        return [""] * len(images), images
    raise InvalidPrompt(
        f"give an image either as all of {', '.join(Features._fields)} or by its image_id"
    )


def _read_jobs(inputs: RequestTensors, images: Sequence[Features], limits: Limits) -> list[Job]:
    coords, labels = inputs.array("point_coords"), inputs.array("point_labels")
    if coords is None or labels is None:
        raise InvalidPrompt("point_coords and point_labels are required")
    check_objects(len(images), coords.shape[1], limits)
    masks = inputs.tensor("mask_input")  # checked on its own device; a launch moves it
    if masks is not None and masks.shape[1] == 0:
        masks = None  # no planes: sent by callers whose requests all carry the same inputs
    multimask_output = inputs.flags("multimask_output", len(images), default=True)
    best_only = inputs.flags("best_only", len(images), default=False)
    jobs = []
    for b, features in enumerate(images):
        mask = None if masks is None else masks[b]
        try:
            prompts = parse_prompts(coords[b], labels[b], mask, limits)
        except InvalidPrompt as error:
            where = f" (image {b} of the request)" if len(images) > 1 else ""
            raise InvalidPrompt(f"{error}{where}") from error
        jobs.append(Job(features, prompts, multimask_output[b], best_only[b]))
    if len({job.candidates for job in jobs}) > 1:
        raise InvalidPrompt(
            "multimask_output and best_only ask for one mask per object in some images of the "
            "batch and for three in others; ask for the same in all, or send two requests"
        )
    return jobs


def respond(request: ParsedRequest, masks: Sequence[Masks], store: ImageStore) -> Any:
    """Answer one request, keeping its images if it asks for that. Raises `InvalidEmbeddings`."""
    if not all(m.is_finite for m in masks):
        raise InvalidEmbeddings(
            "the image's embeddings give masks that are not finite; send the outputs of "
            "sam3_image_encoder unchanged, or, if you sent an image, ask the server's operator: "
            "its encoder overflows"
        )
    ids = [
        (image_id or (store.keep(job.features) if store.max_bytes else "")) if keep else ""
        for job, image_id, keep in zip(
            request.jobs, request.image_ids, request.keep_image, strict=True
        )
    ]
    return pb_utils.InferenceResponse(list(_outputs(request.outputs, masks, ids)))


def _outputs(names: Collection[str], masks: Sequence[Masks], ids: list[str]) -> Iterator[Any]:
    """Yield requested outputs only: a click's unrequested id would cost more than its masks."""
    if "low_res_masks" in names:
        yield _output("low_res_masks", [m.low_res_masks for m in masks])
    if "iou_predictions" in names:
        yield _output("iou_predictions", [m.iou_predictions for m in masks])
    if "image_id" in names:
        yield pb_utils.Tensor("image_id", np.array(ids, np.object_).reshape(-1, 1))


def _output(name: str, images: Sequence[Tensor]) -> Any:
    # One image, the usual case, is not copied.
    batch = images[0].unsqueeze(0) if len(images) == 1 else torch.stack(list(images))
    # Through NumPy, which copies no more than DLPack and takes a third of the time.
    return pb_utils.Tensor(name, batch.numpy())


def error_response(message: str, code: int) -> Any:
    """Answer one request with an error."""
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
