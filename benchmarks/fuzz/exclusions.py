"""What kills tritonserver 2.51 itself, found by this fuzzing and kept out of its runs.

SECURITY.md names each, and what stands between it and a server.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.fuzz.messages import INT64, Request

MOST_SPELLED = 2**23
"""Elements of a shape with values in JSON: Triton 2.51 first allocates what the shape says."""
STRINGS = ("image_id", "masks")
"""Outputs of type BYTES."""


def overflows(shape: Sequence[int]) -> bool:
    """Whether a shape's elements, its zeros left out, are more than 64 bits count.

    Triton 2.51 multiplies them without a look and finds few or none; numpy, in the model's
    process, looks and raises where nobody catches it.
    """
    return math.prod(abs(size) for size in shape if size) * 8 > INT64


def swells(shape: Sequence[int]) -> bool:
    """Whether a shape says more than gigabytes can hold."""
    return math.prod(abs(size) for size in shape) > MOST_SPELLED


def is_lethal(request: Request) -> bool:
    """Whether a request is one that ends the server or its decoder."""
    spelled = any(tensor.values is not None and swells(tensor.shape) for tensor in request.inputs)
    ranks = any(
        output["name"] in STRINGS and "classification" in output.get("parameters", {})
        for output in request.outputs
    )
    return spelled or ranks or any(overflows(tensor.shape) for tensor in request.inputs)
