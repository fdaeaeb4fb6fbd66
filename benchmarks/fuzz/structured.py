"""Requests close to the contract: valid ones with one or two faults, each of a named kind."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from benchmarks.fuzz import files
from benchmarks.fuzz.exclusions import is_lethal
from benchmarks.fuzz.messages import Request, Tensor
from benchmarks.fuzz.subject import CLICK, DECODER, FILE, RLE, Array, Subject, strings
from benchmarks.fuzz.valid import EMBEDDINGS, ValidRequest, valid_requests
from benchmarks.wire import FEATURES

VALID, REFUSED, EITHER = "valid", "refused", "either"
SIZES = [0, 1, 2, 3, 9, 127, 129, 257, 2**16, 2**31 - 1, 2**31, 2**32, -1, -(2**31)]
TOO_MANY_IMAGES = 17
"""One more than the largest batch that any model accepts, which is the decoder's."""
TYPES = ["FP32", "FP64", "FP16", "BF16", "INT8", "INT32", "INT64", "UINT8", "UINT64", "BOOL"]
TYPES += ["BYTES", "", "FP33", "fp32", "bytes", "\N{SNOWMAN}"]
NOT_FINITE = [np.nan, np.inf, -np.inf]
OUTSIDE = [-1e-6, 1.001, -1.0, 2.0, 1e30, -1e35]
OPTIONAL = {"mask_input", "multimask_output", "best_only", "keep_image"}
OUTPUTS = ["low_res_masks", "iou_predictions", "image_id", "masks", "scores", "boxes", "image_size"]
WORDS = st.text(st.characters(codec="utf-8"), max_size=12)
SCALARS = st.one_of(
    st.booleans(), st.integers(-(2**65), 2**65), st.floats(), WORDS, st.just([1]), st.just({})
)


@dataclass(frozen=True)
class Case:
    """A request, what is wrong with it, and what the answer must be."""

    kind: str
    request: Request
    expected: str
    source: ValidRequest
    """The valid request it was made from."""


Fault = Callable[[st.DrawFn, ValidRequest, Subject], tuple[Request, str]]


@st.composite
def cases(draw: st.DrawFn, subject: Subject) -> Case:
    """Of every twelve requests one is valid, one has two faults and the rest have one."""
    faults = draw(st.sampled_from([0, 2] + [1] * 10))
    if faults == 0:
        valid = draw(valid_requests(subject))
        return Case("right", valid.request, VALID, valid)
    kind = draw(st.sampled_from(sorted(FAULTS)))
    valid = draw(valid_requests(subject, draw(st.sampled_from(FORMS[kind]))))
    changed, expected = FAULTS[kind](draw, valid, subject)
    if faults == 2:
        second = FAULTS[draw(st.sampled_from(ANYWHERE))]
        changed, _ = second(draw, replace(valid, request=changed), subject)
        kind, expected = "two faults", EITHER
    if is_lethal(changed):
        return Case("right", valid.request, VALID, valid)
    return Case(kind, changed, expected, valid)


def _pick(draw: st.DrawFn, request: Request) -> Tensor:
    return draw(st.sampled_from(request.inputs))


def _array(request: Request, name: str) -> Array:
    """A copy of a numeric input's values."""
    tensor = request.input(name)
    assert tensor is not None
    kind = {"FP32": np.float32, "FP16": np.float16, "INT32": np.int32}[tensor.datatype]
    return np.frombuffer(tensor.data, kind).reshape(tensor.shape).copy()


def _with(request: Request, name: str, array: Array) -> Request:
    return request.replacing(Tensor.from_array(name, array))


def _fit(data: bytes, size: int) -> bytes:
    """Cut or repeat the data to the given size, unless that is too large to send."""
    if not 0 <= size <= 2**20:
        return data
    return (data * (size // max(1, len(data)) + 1))[:size] if data else bytes(size)


def _place(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(draw(st.integers(0, size - 1)) for size in shape)


def wrong_rank(draw: st.DrawFn, valid: ValidRequest, _: Subject) -> tuple[Request, str]:
    tensor = _pick(draw, valid.request)
    axis = draw(st.integers(0, len(tensor.shape) - 1))
    shape = list(tensor.shape)
    if draw(st.booleans()):
        shape.insert(axis, 1)
    else:
        del shape[axis]
    return valid.request.replacing(replace(tensor, shape=tuple(shape))), REFUSED


def wrong_size(draw: st.DrawFn, valid: ValidRequest, _: Subject) -> tuple[Request, str]:
    tensor = _pick(draw, valid.request)
    axis = draw(st.integers(0, len(tensor.shape) - 1))
    shape = list(tensor.shape)
    count = int(np.prod(shape, dtype=object))
    shape[axis] = draw(st.sampled_from([*SIZES, shape[axis] + 1]))
    item = len(tensor.data) // count if count else 1
    data = _fit(tensor.data, int(np.prod(shape, dtype=object)) * item)
    if draw(st.booleans()):
        data = tensor.data
    return valid.request.replacing(replace(tensor, shape=tuple(shape), data=data)), EITHER


def wrong_type(draw: st.DrawFn, valid: ValidRequest, _: Subject) -> tuple[Request, str]:
    tensor = _pick(draw, valid.request)
    kind = draw(st.sampled_from([kind for kind in TYPES if kind != tensor.datatype]))
    data = _fit(tensor.data, len(tensor.data) * draw(st.sampled_from([1, 2])))
    return valid.request.replacing(replace(tensor, datatype=kind, data=data)), REFUSED


def wrong_length(draw: st.DrawFn, valid: ValidRequest, _: Subject) -> tuple[Request, str]:
    tensor = _pick(draw, valid.request)
    change = draw(st.sampled_from([-4, -1, 1, 3, 4, 1000, -len(tensor.data)]))
    data = tensor.data[:change] if change < 0 else tensor.data + bytes(change)
    if data == tensor.data:
        data += b"\0"
    return valid.request.replacing(replace(tensor, data=data)), REFUSED


def not_finite(draw: st.DrawFn, valid: ValidRequest, _: Subject) -> tuple[Request, str]:
    coords, labels = _array(valid.request, valid.points), _array(valid.request, "point_labels")
    place = _place(draw, labels.shape)
    index = (*place, draw(st.sampled_from([0, 1])))
    coords[index] = draw(st.sampled_from(NOT_FINITE))
    expected = VALID if labels[place] == -1 else REFUSED
    return _with(valid.request, valid.points, coords), expected


def outside(draw: st.DrawFn, valid: ValidRequest, _: Subject) -> tuple[Request, str]:
    coords, labels = _array(valid.request, valid.points), _array(valid.request, "point_labels")
    place = _place(draw, labels.shape)
    scale = 1000 if valid.request.model == FILE else 1
    index = (*place, draw(st.sampled_from([0, 1])))
    coords[index] = draw(st.sampled_from(OUTSIDE)) * scale
    clipped = valid.request.model == FILE and labels[place] in (2, 3)
    expected = VALID if labels[place] == -1 else EITHER if clipped else REFUSED
    return _with(valid.request, valid.points, coords), expected


def wrong_label(draw: st.DrawFn, valid: ValidRequest, _: Subject) -> tuple[Request, str]:
    labels = _array(valid.request, "point_labels")
    wrong = st.sampled_from([4, -2, 7, 255, 2**31 - 1, -(2**31)])
    labels[_place(draw, labels.shape)] = draw(wrong)
    return _with(valid.request, "point_labels", labels), REFUSED


def half_a_box(draw: st.DrawFn, valid: ValidRequest, _: Subject) -> tuple[Request, str]:
    labels = _array(valid.request, "point_labels")
    image, thing, _token = _place(draw, labels.shape)
    labels[image, thing] = draw(st.sampled_from([0, 1]))
    labels[image, thing, : draw(st.integers(1, labels.shape[-1]))] = draw(st.sampled_from([2, 3]))
    return _with(valid.request, "point_labels", labels), REFUSED


def empty_object(draw: st.DrawFn, valid: ValidRequest, _: Subject) -> tuple[Request, str]:
    labels = _array(valid.request, "point_labels")
    labels[_place(draw, labels.shape)[:2]] = -1
    changed = _with(valid.request, "point_labels", labels)
    return changed, EITHER if changed.input("mask_input") else REFUSED


def broken_mask(draw: st.DrawFn, valid: ValidRequest, subject: Subject) -> tuple[Request, str]:
    side = subject.mask_side
    mask = np.zeros((valid.images, valid.objects, side, side), np.float16)
    if draw(st.booleans()):
        mask[:] = np.nan
        mask[_place(draw, mask.shape)] = 0
    else:
        mask[_place(draw, mask.shape)] = draw(st.sampled_from(NOT_FINITE))
    return _with(valid.request, "mask_input", mask), REFUSED


def broken_embeddings(
    draw: st.DrawFn, valid: ValidRequest, subject: Subject
) -> tuple[Request, str]:
    name = draw(st.sampled_from(FEATURES))
    values = np.repeat(subject.features[name], valid.images, axis=0)
    if draw(st.booleans()):
        values[_place(draw, values.shape)] = draw(st.sampled_from(NOT_FINITE))
    else:
        with np.errstate(over="ignore"):
            values *= np.float32(draw(st.sampled_from([0, -1, 1e6, 1e20, 3e38])))
    return _with(valid.request, name, values), EITHER


def missing(draw: st.DrawFn, valid: ValidRequest, _: Subject) -> tuple[Request, str]:
    needed = [t.name for t in valid.request.inputs if t.name not in OPTIONAL]
    return valid.request.without(draw(st.sampled_from(needed))), REFUSED


def unknown_input(draw: st.DrawFn, valid: ValidRequest, _: Subject) -> tuple[Request, str]:
    tensor = replace(_pick(draw, valid.request), name=draw(WORDS))
    return replace(valid.request, inputs=(*valid.request.inputs, tensor)), EITHER


def twice(draw: st.DrawFn, valid: ValidRequest, _: Subject) -> tuple[Request, str]:
    inputs = (*valid.request.inputs, _pick(draw, valid.request))
    return replace(valid.request, inputs=inputs), REFUSED


def beyond_limits(draw: st.DrawFn, valid: ValidRequest, _: Subject) -> tuple[Request, str]:
    many = draw(st.sampled_from([(257, 1), (1000, 1), (1, 129), (1, 5000), (257, 129), (9000, 2)]))
    shape = (valid.images, *many)
    changed = _with(valid.request, valid.points, np.full((*shape, 2), 0.5, np.float32))
    changed = _with(changed.without("mask_input"), "point_labels", np.ones(shape, np.int32))
    return changed, REFUSED


def wrong_id(draw: st.DrawFn, valid: ValidRequest, subject: Subject) -> tuple[Request, str]:
    near = bytearray(subject.image_id)
    near[draw(st.integers(0, len(near) - 1))] ^= 1 << draw(st.integers(0, 7))
    odd = [b"", bytes(near), subject.image_id + b"=", b" " + subject.image_id, b"x" * 2**18]
    name = draw(st.one_of(st.sampled_from(odd), st.binary(max_size=64)))
    return _with(valid.request, "image_id", strings(name, valid.images)), REFUSED


def broken_string(draw: st.DrawFn, valid: ValidRequest, _: Subject) -> tuple[Request, str]:
    name = "encoded_image" if valid.request.model == FILE else "image_id"
    tensor = valid.request.input(name)
    assert tensor is not None
    length = draw(st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1, len(tensor.data)]))
    data = length.to_bytes(4, "little") + tensor.data[4 : draw(st.integers(4, 40))]
    return valid.request.replacing(replace(tensor, data=data)), REFUSED


def damaged_file(draw: st.DrawFn, valid: ValidRequest, subject: Subject) -> tuple[Request, str]:
    source = draw(st.sampled_from(subject.files))
    rng = random.Random(draw(st.integers(0, 2**32)))
    chosen, expected = files.damaged(source, rng), EITHER
    kind = draw(st.integers(0, 9))
    if kind < 3:
        bad = files.bombs(subject.files[0]) if kind == 0 else files.no_images()
        chosen, expected = draw(st.sampled_from(bad)), REFUSED
    array = strings(chosen, valid.images)
    return _with(valid.request, "encoded_image", array), expected


def wrong_image_size(draw: st.DrawFn, valid: ValidRequest, _: Subject) -> tuple[Request, str]:
    sizes: list[tuple[int, int]] = [
        (0, 0),
        (0, 5),
        (-1, -1),
        (-3, 7),
        (2**31 - 1,) * 2,
        (-(2**31), 1),
    ]
    sizes += [(50_000_001, 1), (65_536, 65_536)]
    size = draw(st.sampled_from(sizes))
    return _with(valid.request, "image_size", np.full((valid.images, 2), size, np.int32)), REFUSED


def thin_image(draw: st.DrawFn, valid: ValidRequest, _: Subject) -> tuple[Request, str]:
    size = draw(st.sampled_from([(40_000, 1), (1, 40_000), (65_535, 3), (1, 33_000)]))
    return _with(valid.request, "image_size", np.full((valid.images, 2), size, np.int32)), VALID


def batch_mismatch(draw: st.DrawFn, valid: ValidRequest, _: Subject) -> tuple[Request, str]:
    tensor = _pick(draw, valid.request)
    images = draw(st.sampled_from([n for n in (0, 1, 2, 3, 9) if n != valid.images]))
    each = tensor.data[: len(tensor.data) // valid.images]
    changed = replace(tensor, shape=(images, *tensor.shape[1:]), data=each * images)
    return valid.request.replacing(changed), REFUSED


def batch_limits(draw: st.DrawFn, valid: ValidRequest, _: Subject) -> tuple[Request, str]:
    images = draw(st.sampled_from([0, TOO_MANY_IMAGES]))
    inputs = tuple(
        replace(
            t, shape=(images, *t.shape[1:]), data=t.data[: len(t.data) // valid.images] * images
        )
        for t in valid.request.inputs
    )
    return replace(valid.request, inputs=inputs), REFUSED


def odd_parameters(draw: st.DrawFn, valid: ValidRequest, _: Subject) -> tuple[Request, str]:
    known = ["sequence_id", "sequence_start", "sequence_end", "priority", "timeout"]
    known += ["binary_data_output", "headers", "triton_enable_empty_final_response"]
    names = st.one_of(st.sampled_from(known), WORDS)
    chosen = draw(st.dictionaries(names, SCALARS, min_size=1, max_size=3))
    return replace(valid.request, parameters=chosen), EITHER


def odd_tensor_parameters(draw: st.DrawFn, valid: ValidRequest, _: Subject) -> tuple[Request, str]:
    known = ["shared_memory_region", "shared_memory_byte_size", "shared_memory_offset"]
    known += ["binary_data_size", "binary_data", "classification"]
    names = st.one_of(st.sampled_from(known), WORDS)
    chosen = draw(st.dictionaries(names, SCALARS, min_size=1, max_size=3))
    tensor = replace(_pick(draw, valid.request), parameters=chosen)
    return valid.request.replacing(tensor), EITHER


def odd_outputs(draw: st.DrawFn, valid: ValidRequest, _: Subject) -> tuple[Request, str]:
    names = st.one_of(st.sampled_from(OUTPUTS), WORDS)
    parameters = st.dictionaries(
        st.sampled_from(["classification", "binary_data", "shared_memory_region", "odd"]),
        SCALARS,
        max_size=2,
    )
    output = st.fixed_dictionaries({"name": names}, optional={"parameters": parameters})
    chosen = draw(st.lists(output, min_size=1, max_size=3))
    return replace(valid.request, outputs=tuple(chosen)), EITHER


def unknown_model(draw: st.DrawFn, valid: ValidRequest, _: Subject) -> tuple[Request, str]:
    if draw(st.booleans()):
        version = draw(st.sampled_from(["0", "2", "-1", "x", "9" * 40, "../1", " "]))
        return replace(valid.request, version=version), REFUSED
    odd = st.sampled_from(["sam3", "../sam3_interactive", "SAM3_INTERACTIVE", "sam3_interactive "])
    return replace(valid.request, model=draw(st.one_of(odd, WORDS))), REFUSED


def spelled_out(draw: st.DrawFn, valid: ValidRequest, _: Subject) -> tuple[Request, str]:
    name = draw(st.sampled_from([valid.points, "point_labels"]))
    tensor = valid.request.input(name)
    assert tensor is not None
    leaves: Any = st.one_of(
        st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), WORDS
    )
    own = _array(valid.request, name).ravel().tolist()
    odd = st.recursive(leaves, lambda inner: st.lists(inner, max_size=6), max_leaves=8)
    values = draw(st.one_of(st.just(own), st.just(own[1:]), st.just(own + own[:1]), odd))
    return valid.request.replacing(replace(tensor, values=values or [])), EITHER


FAULTS: dict[str, Fault] = {
    "wrong rank": wrong_rank,
    "wrong size of an axis": wrong_size,
    "wrong data type": wrong_type,
    "data of another length": wrong_length,
    "NaN or infinite coordinates": not_finite,
    "coordinates outside": outside,
    "unknown label": wrong_label,
    "half a box": half_a_box,
    "empty object": empty_object,
    "mask with NaN or infinite logits": broken_mask,
    "embeddings out of range": broken_embeddings,
    "input missing": missing,
    "input unknown": unknown_input,
    "input twice": twice,
    "beyond the limits": beyond_limits,
    "image_id never issued": wrong_id,
    "broken string": broken_string,
    "damaged image file": damaged_file,
    "impossible image_size": wrong_image_size,
    "thin image_size": thin_image,
    "batches that differ": batch_mismatch,
    "batch of 0 or 17": batch_limits,
    "odd parameters": odd_parameters,
    "odd parameters of an input": odd_tensor_parameters,
    "odd outputs": odd_outputs,
    "unknown model or version": unknown_model,
    "odd values spelled out": spelled_out,
}
CHEAP = [DECODER] * 6 + [CLICK] * 3 + [FILE]
FORMS: dict[str, list[Any]] = {kind: [None] for kind in FAULTS} | {
    "NaN or infinite coordinates": CHEAP,
    "coordinates outside": CHEAP,
    "unknown label": CHEAP,
    "half a box": CHEAP,
    "empty object": CHEAP,
    "beyond the limits": CHEAP,
    "mask with NaN or infinite logits": [DECODER, CLICK],
    "embeddings out of range": [EMBEDDINGS],
    "image_id never issued": [DECODER, CLICK],
    "broken string": [DECODER, CLICK, FILE],
    "damaged image file": [FILE],
    "impossible image_size": [CLICK, CLICK, CLICK, RLE],
    "thin image_size": [CLICK],
}
"""The models each fault is tried on: where it is meaningful, and mostly where it is cheap."""
ANYWHERE = [
    "wrong rank", "wrong size of an axis", "wrong data type", "data of another length",
    "odd parameters", "odd outputs", "input twice", "batch of 0 or 17",
]  # fmt: skip
