"""Requests and answers as values: from pixels and prompts to arrays, and from arrays to logits."""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from tritonclient.utils import triton_to_np_dtype

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
        """Read the sizes from the ensemble's configuration and the limits from the decoder's.

        Raises ServerError for a configuration that is not of these models.
        """
        return cls(
            image_side=_side(interactive, contract.IMAGE, "S"),
            mask_side=_side(interactive, contract.MASK_INPUT, "M"),
            max_objects=_limit(decoder, contract.MAX_OBJECTS),
            max_tokens=_limit(decoder, contract.MAX_TOKENS),
        )


MAX_SIDE = 8192
"""Longest side of a model's images and masks that is believed: eight times SAM 3's, 200 MB."""


def _side(config: Mapping[str, Any], tensor: contract.Tensor, letter: str) -> int:
    """The length of the axes of an input that the contract gives this letter."""
    dims = _named(config.get("input"), tensor.name).get("dims")
    axes = tensor.axes[1:]
    sizes = list(map(_whole, dims)) if isinstance(dims, list) else []
    sides = {size for size, axis in zip(sizes, axes, strict=False) if axis == letter}
    if len(sizes) != len(axes) or len(sides) != 1 or not 1 <= max(sides) <= MAX_SIDE:
        wanted = f"dims {list(axes)} with {letter} from 1 to {MAX_SIDE}"
        raise _incompatible_model(config, f"input {tensor.name!r}", "dims", dims, wanted)
    return sides.pop()


def _limit(config: Mapping[str, Any], name: str) -> int:
    parameters = config.get("parameters")
    value = parameters.get(name) if isinstance(parameters, Mapping) else None
    text = value.get("string_value") if isinstance(value, Mapping) else None
    if _whole(text) < 1:
        raise _incompatible_model(config, f"parameter {name!r}", "value", text, "at least 1")
    return _whole(text)


def _named(tensors: Any, name: str) -> Mapping[str, Any]:
    found = tensors if isinstance(tensors, list) else []
    named = (item for item in found if isinstance(item, Mapping) and item.get("name") == name)
    return next(named, {})


def _whole(value: Any) -> int:
    """An integer, which gRPC gives as text; 0, which no size or limit can be, for anything else."""
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return 0


def _incompatible_model(
    config: Mapping[str, Any], what: str, kind: str, found: Any, wanted: str
) -> ServerError:
    state = f"has no {what}" if found is None else f"has the {what} with the {kind} {found!r:.80}"
    return ServerError(
        f"the server's model {config.get('name')!r:.80} {state}, but this client needs {wanted}; "
        "serve the repository that `python -m export` builds"
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
    if not isinstance(value, (bytes, str)):
        raise _incompatible_answer(contract.IMAGE_ID, ids, "B = 1")
    return value.encode() if isinstance(value, str) else value


def _output(outputs: Mapping[str, Array], tensor: contract.Tensor, objects: int) -> Array:
    array = outputs.get(tensor.name)
    if array is None or not _fits(array, tensor, objects):
        raise _incompatible_answer(tensor, array, f"B = 1, N = {objects}, K = 1")
    return array


def _fits(array: Array, tensor: contract.Tensor, objects: int) -> bool:
    leading, sides = array.shape[:3], set(array.shape[3:])
    squares = len(sides) <= 1 and 0 not in sides
    known = array.dtype == triton_to_np_dtype(tensor.datatype)
    return known and squares and leading == (1, objects, 1) and array.ndim == len(tensor.axes)


def _incompatible_answer(tensor: contract.Tensor, array: Array | None, sizes: str) -> ServerError:
    found = "nothing" if array is None else f"{array.dtype} {list(array.shape)}"
    return ServerError(
        f"the server answered {found} for {tensor.name!r}, expected {tensor.datatype} "
        f"{list(tensor.axes)} with {sizes}: the client and the model repository are incompatible"
    )
