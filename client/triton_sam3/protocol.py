"""Requests and answers as values: from pixels and prompts to arrays, and from arrays to logits."""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from . import contract
from .errors import ServerError
from .flow import Array, Infer
from .prompts import PackedPrompts


@dataclass(frozen=True)
class ServedModel:
    """What the server's model configuration says: sizes in pixels, limits per request."""

    image_side: int
    mask_side: int
    max_objects: int
    max_tokens: int

    @classmethod
    def from_configs(
        cls, interactive: Mapping[str, Any], decoder: Mapping[str, Any]
    ) -> "ServedModel":
        """Read the sizes from the ensemble's configuration and the limits from the decoder's."""
        image = _dims(interactive, contract.IMAGE.name)
        mask = _dims(interactive, contract.MASK_INPUT.name)
        return cls(
            image_side=image[0],
            mask_side=mask[-1],
            max_objects=_limit(decoder, contract.MAX_OBJECTS),
            max_tokens=_limit(decoder, contract.MAX_TOKENS),
        )


def _dims(config: Mapping[str, Any], name: str) -> list[int]:
    for tensor in config.get("input", ()):
        if tensor["name"] == name:
            return [int(size) for size in tensor["dims"]]
    raise _incompatible_model(config, f"input {name!r}")


def _limit(config: Mapping[str, Any], name: str) -> int:
    value = config.get("parameters", {}).get(name)
    if value is None:
        raise _incompatible_model(config, f"parameter {name!r}")
    return int(value["string_value"])


def _incompatible_model(config: Mapping[str, Any], missing: str) -> ServerError:
    return ServerError(
        f"the server's model {config.get('name')!r} has no {missing}, so it is not the one this "
        "client expects; serve the repository that `python -m export` builds"
    )


@dataclass(frozen=True)
class Flags:
    """The optional switches of a request; only those that differ from the default are sent."""

    multimask_output: bool = contract.MULTIMASK_DEFAULT
    keep_image: bool = False


@dataclass(frozen=True)
class Answer:
    """The best candidate of each of N objects.

    `logits` [N, M, M] float16, `scores` [N] float32 (predicted IoU), `image_id` empty unless the
    image is kept.
    """

    logits: npt.NDArray[np.float16]
    scores: npt.NDArray[np.float32]
    image_id: bytes


_DIGEST_BYTES = 16
"""Long enough that nobody can make two images share a digest."""

_CHUNK_BYTES = 1 << 22
"""Bytes hashed in one go; a photo of 12 megapixels is 9 such chunks, hashed in parallel."""


def digest(pixels: npt.NDArray[np.uint8]) -> str:
    """Return the hexadecimal digest of an image [H, W, 3].

    It is computed from the caller's pixels, not the resized ones: resizing costs more than hashing,
    and a known image then needs no resizing at all.
    """
    data = np.ascontiguousarray(pixels).data.cast("B")
    chunks = [data[start : start + _CHUNK_BYTES] for start in range(0, len(data), _CHUNK_BYTES)]
    state = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=_DIGEST_BYTES)
    if len(chunks) == 1:
        state.update(_hash(chunks[0]))
    else:
        with ThreadPoolExecutor(min(len(chunks), os.cpu_count() or 1)) as pool:
            state.update(b"".join(pool.map(_hash, chunks)))
    return state.hexdigest()


def _hash(chunk: memoryview) -> bytes:
    return hashlib.blake2b(chunk, digest_size=_DIGEST_BYTES).digest()


def image_request(
    image: npt.NDArray[np.uint8], image_digest: str, prompts: PackedPrompts, flags: Flags
) -> Infer:
    """Ask about an image [S, S, 3] that is sent with the request."""
    inputs = {contract.IMAGE.name: image[None], **_prompt_inputs(prompts, flags)}
    outputs = [contract.LOW_RES_MASKS.name, contract.IOU_PREDICTIONS.name]
    if flags.keep_image:
        inputs[contract.KEEP_IMAGE.name] = _flag(True)
        outputs.append(contract.IMAGE_ID.name)
    return Infer(
        contract.INTERACTIVE, inputs, tuple(outputs), _headers(image_digest, contract.ENCODE)
    )


def keep_request(image: npt.NDArray[np.uint8], image_digest: str, prompts: PackedPrompts) -> Infer:
    """Have the server keep an image [S, S, 3]; no mask is returned."""
    request = image_request(image, image_digest, prompts, Flags(keep_image=True))
    return replace(request, outputs=(contract.IMAGE_ID.name,))


def click_request(
    image_id: bytes, image_digest: str, prompts: PackedPrompts, flags: Flags
) -> Infer:
    """Ask about an image that the server keeps: prompts only, no pixels."""
    inputs = {
        contract.IMAGE_ID.name: np.array([[image_id]], dtype=np.object_),
        **_prompt_inputs(prompts, flags),
    }
    outputs = (contract.LOW_RES_MASKS.name, contract.IOU_PREDICTIONS.name)
    return Infer(contract.DECODER, inputs, outputs, _headers(image_digest, contract.CLICK))


def _prompt_inputs(prompts: PackedPrompts, flags: Flags) -> dict[str, Array]:
    inputs: dict[str, Array] = {
        contract.POINT_COORDS.name: prompts.point_coords[None],
        contract.POINT_LABELS.name: prompts.point_labels[None],
        contract.BEST_ONLY.name: _flag(True),
    }
    if prompts.mask_input is not None:
        inputs[contract.MASK_INPUT.name] = prompts.mask_input[None]
    if flags.multimask_output != contract.MULTIMASK_DEFAULT:
        inputs[contract.MULTIMASK_OUTPUT.name] = _flag(flags.multimask_output)
    return inputs


def _flag(value: bool) -> npt.NDArray[np.bool_]:
    return np.array([[value]], np.bool_)


def _headers(image_digest: str, work: str) -> dict[str, str]:
    return {contract.IMAGE_HEADER: image_digest, contract.WORK_HEADER: work}


def read_answer(outputs: Mapping[str, Array], objects: int) -> Answer:
    """Read an answer's arrays, checking that they match the request."""
    logits = _output(outputs, contract.LOW_RES_MASKS, objects)[0]
    scores = _output(outputs, contract.IOU_PREDICTIONS, objects)[0]
    # `best_only` leaves one candidate; taking it as a slice copies nothing.
    return Answer(logits[:, 0], scores[:, 0], read_image_id(outputs))


def read_image_id(outputs: Mapping[str, Array]) -> bytes:
    """The id under which the server keeps the image, empty if it does not."""
    ids = outputs.get(contract.IMAGE_ID.name)
    if ids is None or ids.size == 0:
        return b""
    value = ids.flat[0]
    return value.encode() if isinstance(value, str) else bytes(value)


def _output(outputs: Mapping[str, Array], tensor: contract.Tensor, objects: int) -> Array:
    array = outputs.get(tensor.name)
    if array is None or array.ndim != len(tensor.axes) or array.shape[:3] != (1, objects, 1):
        found = "nothing" if array is None else f"shape {list(array.shape)}"
        raise ServerError(
            f"the server answered {found} for {tensor.name!r}, expected shape "
            f"{list(tensor.axes)} with B = 1, N = {objects}, K = 1: the client and the model "
            "repository are incompatible"
        )
    return array
