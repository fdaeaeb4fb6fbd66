"""Requests that crash tritonserver 2.51 itself, found by this fuzzer and excluded from its runs.

SECURITY.md lists each, and what protects a server from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.fuzz.messages import INT64, Request

MAX_ELEMENTS = 2**23
"""In a shape with values in JSON: Triton 2.51 first allocates as much as the shape claims."""
STRINGS = ("image_id", "masks")
"""Outputs of type BYTES."""


def overflows(shape: Sequence[int]) -> bool:
    """Whether the product of a shape's nonzero sizes overflows 64 bits.

    Triton 2.51 multiplies without checking and gets a small number or zero; numpy, in the model's
    process, checks and raises where nothing catches it.
    """
    return math.prod(abs(size) for size in shape if size) * 8 > INT64


def is_huge(shape: Sequence[int]) -> bool:
    """Whether a shape claims more elements than MAX_ELEMENTS."""
    return math.prod(abs(size) for size in shape) > MAX_ELEMENTS


def is_lethal(request: Request) -> bool:
    """Whether a request crashes the server or its decoder."""
    spelled = any(tensor.values is not None and is_huge(tensor.shape) for tensor in request.inputs)
    ranks = any(
        output["name"] in STRINGS and "classification" in output.get("parameters", {})
        for output in request.outputs
    )
    return spelled or ranks or any(overflows(tensor.shape) for tensor in request.inputs)
