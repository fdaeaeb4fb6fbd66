"""The parts of `triton_python_backend_utils` that the decoder uses; only Triton's stubs have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

from tests.model_repository.sam3_prompt_decoder.served import Array, Arrays

USERS = ("model", "wire", "metrics")
"""The decoder's modules that import it."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of a request or a response."""

    called: str
    array: Array

    def name(self) -> str:
        return self.called

    def as_numpy(self) -> Array:
        return self.array

    def is_cpu(self) -> bool:
        return True

    def to_dlpack(self) -> Any:
        return self.array.__dlpack__()


@dataclass(frozen=True)
class Request:
    """A request as Triton passes it to `execute`."""

    arrays: Arrays

    def inputs(self) -> list[Tensor]:
        return [Tensor(name, array) for name, array in self.arrays.items()]

    def requested_output_names(self) -> list[str]:
        return ["low_res_masks", "iou_predictions", "image_id"]


@dataclass(frozen=True)
class TritonError:
    """A message and a code."""

    sentence: str
    code: str
    INVALID_ARG = "INVALID_ARG"
    NOT_FOUND = "NOT_FOUND"
    INTERNAL = "INTERNAL"


@dataclass(frozen=True)
class InferenceResponse:
    """Tensors or an error."""

    tensors: Sequence[Tensor] = ()
    error: TritonError | None = None

    @property
    def arrays(self) -> dict[str, Array]:
        assert self.error is None, self.error
        return {tensor.called: tensor.array for tensor in self.tensors}


class Metric:
    """A metric that nobody reads."""

    def increment(self, by: float) -> None: ...

    set = observe = increment


class TritonModelException(Exception):
    """Raised by a model that cannot be loaded."""


def make_backend() -> Any:
    """The module; what is logged to it is in `warnings` and `errors`."""
    module: Any = ModuleType("triton_python_backend_utils")
    module.warnings, module.errors = [], []
    module.Logger = SimpleNamespace(log_warn=module.warnings.append, log_error=module.errors.append)
    module.Metric = Metric
    module.MetricFamily = lambda **_: SimpleNamespace(Metric=lambda **_: module.Metric())
    for kind in ("GAUGE", "COUNTER", "HISTOGRAM"):
        setattr(module.MetricFamily, kind, kind)
    for made in (Tensor, TritonError, InferenceResponse, TritonModelException):
        setattr(module, made.__name__, made)
    return module
