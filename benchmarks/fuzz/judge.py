"""Judge whether an answer is acceptable for its request."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.fuzz.exchange import CLOSED, Answer
from benchmarks.fuzz.structured import REFUSED, VALID, Case
from benchmarks.fuzz.subject import Array

ANSWERED, REJECTED, DISCONNECTED, FRONTEND_ERROR, FINDING = (
    "valid",
    "refused",
    "closed",
    "Triton's own",
    "finding",
)
CLIENT_ERRORS = {"INVALID_ARGUMENT", "NOT_FOUND", "OUT_OF_RANGE", "UNIMPLEMENTED"}
RETRYABLE = {"RESOURCE_EXHAUSTED", "UNAVAILABLE", "503"}
"""Statuses of a full queue, which a valid request may get too."""

SENTENCE = re.compile(r"[A-Za-z]{2,}\W+[A-Za-z]{2,}")
LEAK = re.compile(
    r"/(tmp|usr|home|opt|work|var|dev|root|etc|proc|mnt)/|0x[0-9a-fA-F]{5,}|object at "
    r"|triton_sam3_[0-9a-f]{6}|triton_python_backend_shm|Traceback|File \"|\.py\b|\.cc\b|\.so\b"
)
FRONTEND = {
    "JSON that does not parse": ("500", r"failed to parse the request JSON buffer: "),
    "JSON of an unexpected type": (
        "500",
        r"Unable to (parse|set) '.*': |parameter key '.*' was not found in the JSON",
    ),
    "an unknown Content-Encoding": ("501", r"Unsupported compression type$"),
    "a message that is not protobuf": ("INTERNAL", r"Unable to parse request$"),
    "an unknown gRPC method, without a message": ("UNIMPLEMENTED", r"$"),
}
"""What Triton's frontend answers with a server error, or without a message, before any model."""

MASK_LIMIT = 32.0


@dataclass(frozen=True)
class Verdict:
    outcome: str
    reason: str = ""
    """Why it is a finding, or the name of the frontend's error."""


def judge(
    answer: Answer, case: Case | None, framed: bool, mask_side: int, sent: bytes = b""
) -> Verdict:
    """Judge the answer to a structured case, or to octets (None), for which none is expected."""
    if answer.code in ("200", "OK"):
        return _judge_result(answer, case, mask_side)
    if answer.code == CLOSED and not framed:
        return Verdict(DISCONNECTED)
    return _judge_refusal(answer, case, sent)


def _judge_refusal(answer: Answer, case: Case | None, sent: bytes) -> Verdict:
    leak = LEAK.search(answer.text)
    if leak and leak[0].encode() not in sent:  # otherwise it quotes the caller's own words
        return Verdict(FINDING, f"{answer.code} leaks {leak[0]!r}: {answer.text}")
    for name, (code, text) in FRONTEND.items():
        if answer.code == code and re.match(text, answer.text, re.DOTALL):
            return Verdict(FRONTEND_ERROR, name)
    clients = answer.code in CLIENT_ERRORS | RETRYABLE or re.fullmatch(r"4\d\d", answer.code)
    if not clients or not SENTENCE.search(answer.text):
        return Verdict(FINDING, f"{answer.code} {answer.text!r}")
    if case and case.expected == VALID and answer.code not in RETRYABLE:
        return Verdict(FINDING, f"a valid request was refused: {answer.code} {answer.text}")
    return Verdict(REJECTED)


def _judge_result(answer: Answer, case: Case | None, mask_side: int) -> Verdict:
    if case and case.expected == REFUSED:
        return Verdict(FINDING, "an invalid request was answered")
    if answer.result is None:
        return Verdict(ANSWERED)
    try:
        outputs = _outputs(answer.result)
        problem = _problem(outputs, case, mask_side)
    except Exception as error:  # an unreadable answer is a finding, whatever the reason
        problem = f"unreadable: {type(error).__name__}: {error}"
    return Verdict(FINDING, problem) if problem else Verdict(ANSWERED)


def _outputs(result: Any) -> dict[str, Array]:
    response = result.get_response()
    if isinstance(response, dict):
        names = [output["name"] for output in response["outputs"]]
    else:
        names = [output.name for output in response.outputs]
    return {name: result.as_numpy(name) for name in names}


def _problem(outputs: Mapping[str, Array], case: Case | None, side: int) -> str:
    """What is wrong with a result; empty if nothing is."""
    ranked = {o["name"] for o in case.request.outputs} if case else set()
    plain = {n: a for n, a in outputs.items() if not (n in ranked and a.dtype == np.object_)}
    for name, array in plain.items():
        if name in CHECKS and (problem := CHECKS[name](array, side)):
            return f"{name} {list(array.shape)}: {problem}"
    if len({array.shape[0] for array in plain.values()}) > 1:
        return "outputs of different batch sizes"
    return _shape_problem(plain, case) if case and case.expected == VALID else ""


def _shape_problem(outputs: Mapping[str, Array], case: Case) -> str:
    images, objects, candidates = case.source.images, case.source.objects, case.source.candidates
    expected = {
        "low_res_masks": (images, objects, candidates),
        "iou_predictions": (images, objects, candidates),
        "masks": (images, objects),
        "scores": (images, objects),
        "boxes": (images, objects, 4),
    }
    if not outputs:
        return "no outputs"
    for name, array in outputs.items():
        shape = expected.get(name, ())
        if array.shape[: len(shape)] != shape:
            return f"{name} has shape {array.shape}, expected {shape}"
    return ""


def _logits(array: Array, side: int) -> str:
    if array.dtype != np.float16 or array.ndim != 5 or array.shape[3:] != (side, side):
        return f"{array.dtype}, expected float16 [B, N, K, {side}, {side}]"
    if array.shape[2] not in (1, 3):
        return "neither one candidate nor three"
    if not np.isfinite(array).all():
        return "not finite"
    return "" if (np.abs(array) <= MASK_LIMIT).all() else "beyond ±32"


def _unit(array: Array, _: int) -> str:
    if array.dtype != np.float32:
        return f"{array.dtype}, expected float32"
    return "" if ((array >= 0) & (array <= 1)).all() else "not within 0…1"


def _rle(array: Array, _: int) -> str:
    for text in array.ravel():
        mask = json.loads(text)
        if set(mask) != {"size", "counts"} or min(mask["size"]) < 1:
            return f"not run lengths: {text[:80]!r}"
    return "" if array.ndim == 2 else "expected [B, N]"


def _boxes(array: Array, _: int) -> str:
    right = array.dtype == np.float32 and array.ndim == 3 and array.shape[-1] == 4
    if not right or not np.isfinite(array).all():
        return "expected finite float32 [B, N, 4]"
    return "" if (array[..., :2] <= array[..., 2:]).all() else "corners in the wrong order"


def _ids(array: Array, _: int) -> str:
    # tritonclient returns strings as bytes, or unchanged if they came as JSON.
    ids = (v if isinstance(v, bytes) else str(v).encode() for v in array.ravel())
    right = all(re.fullmatch(rb"|[\w-]{22}", value) for value in ids)
    return "" if right else "neither empty nor an id"


def _sizes(array: Array, _: int) -> str:
    return "" if array.dtype == np.int32 and (array > 0).all() else "not positive"


CHECKS: dict[str, Callable[[Array, int], str]] = {
    "low_res_masks": _logits,
    "iou_predictions": _unit,
    "scores": _unit,
    "masks": _rle,
    "boxes": _boxes,
    "image_id": _ids,
    "image_size": _sizes,
}
