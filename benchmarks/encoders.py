"""The exported image encoder outside Triton, on whatever the machine has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from export.encoder import FEATURES

CUDA = "CUDAExecutionProvider"
Encoder = Callable[[Tensor], tuple[Tensor, ...]]
"""UINT8 [B, S, S, 3] on the device → the three embeddings on the device."""

TORCH_TYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}
NUMPY_TYPES = {torch.float32: np.float32, torch.float16: np.float16, torch.uint8: np.uint8}


class OnnxRuntimeEncoder:
    """`model.onnx` in ONNX Runtime, input and outputs bound where they are: nothing is copied.

    Raises RuntimeError where this ONNX Runtime has no provider for the device.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        if device.type == "cuda" and CUDA not in ort.get_available_providers():
            raise RuntimeError("this onnxruntime was built without CUDA")
        self._device = device
        self._session = ort.InferenceSession(path, providers=_providers(device))
        if device.type == "cuda" and self._session.get_providers()[0] != CUDA:
            raise RuntimeError("onnxruntime could not load its CUDA provider")
        self._outputs = {output.name: output for output in self._session.get_outputs()}

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        binding = self._session.io_binding()
        self._bind(binding.bind_input, "image", images)
        features = tuple(self._empty(name, len(images)) for name in FEATURES)
        for name, feature in zip(FEATURES, features, strict=True):
            self._bind(binding.bind_output, name, feature)
        self._session.run_with_iobinding(binding)
        return features

    def _empty(self, name: str, batch: int) -> Tensor:
        output = self._outputs[name]
        shape = (batch, *output.shape[1:])
        return torch.empty(shape, dtype=TORCH_TYPES[output.type], device=self._device)

    def _bind(self, bind: Callable[..., None], name: str, tensor: Tensor) -> None:
        bind(
            name,
            self._device.type,
            self._device.index or 0,
            NUMPY_TYPES[tensor.dtype],
            tuple(tensor.shape),
            tensor.data_ptr(),
        )


def _providers(device: torch.device) -> list[object]:
    if device.type != "cuda":
        return ["CPUExecutionProvider"]
    # On PyTorch's stream: its events then time the graph, and nothing waits for another stream.
    stream = str(torch.cuda.current_stream(device).cuda_stream)
    options = {"device_id": device.index or 0, "user_compute_stream": stream}
    return [(CUDA, options), "CPUExecutionProvider"]


def pytorch_encoder(checkpoint: Path, dtype: torch.dtype, device: torch.device) -> Encoder:
    """The same network run by PyTorch, in the arrangement that is exported."""
    from export.checkpoint import load  # noqa: PLC0415 - needs sam3, which the server does not
    from export.encoder import ImageEncoder  # noqa: PLC0415

    encoder = ImageEncoder(load(checkpoint), dtype).to(device)

    @torch.inference_mode()
    def encode(images: Tensor) -> tuple[Tensor, ...]:
        features: tuple[Tensor, ...] = encoder(images)
        return features

    return encode
