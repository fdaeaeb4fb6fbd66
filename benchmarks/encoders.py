"""The exported image encoder outside Triton, on whatever device the machine has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from export.accelerator import batch_profile
from export.checkpoint import load
from export.encoder import FEATURES, ImageEncoder

CPU = "CPUExecutionProvider"
CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
Encoder = Callable[[Tensor], tuple[Tensor, ...]]
"""UINT8 [B, S, S, 3] on the device → the three embeddings on the device."""

TORCH_TYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}
NUMPY_TYPES = {torch.float32: np.float32, torch.float16: np.float16, torch.uint8: np.uint8}


class OnnxRuntimeEncoder:
    """`model.onnx` in ONNX Runtime, with its input and outputs bound in place: nothing is copied.

    side: S of its input [B, S, S, 3].
    tensorrt: let TensorRT compile it, for batches of 1 to MAX_BATCH; on a GPU only.

    Raises RuntimeError if this ONNX Runtime has no provider for the device.
    """

    def __init__(self, path: Path, device: torch.device, side: int, *, tensorrt: bool) -> None:
        provider = TENSORRT if tensorrt else CUDA if device.type == "cuda" else CPU
        if provider not in ort.get_available_providers():
            raise RuntimeError(f"this onnxruntime was built without {provider}")
        if device.type == "cuda":
            ort.preload_dlls()  # CUDA's libraries from NVIDIA's packages
        self._device = device
        # A separate stream: PyTorch's default stream is number 0, which means "none" here.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        providers = _providers(side, device, self._stream, tensorrt=tensorrt)
        self._session = ort.InferenceSession(path, providers=providers)
        if self._session.get_providers()[0] != provider:
            raise RuntimeError(f"onnxruntime could not load its {provider}")
        self._outputs = {output.name: output for output in self._session.get_outputs()}

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        binding = self._session.io_binding()
        self._bind(binding.bind_input, "image", images)
        features = tuple(self._empty(name, len(images)) for name in FEATURES)
        for name, feature in zip(FEATURES, features, strict=True):
            self._bind(binding.bind_output, name, feature)
        self._run(binding)
        return features

    def _run(self, binding: ort.IOBinding) -> None:
        """Run in order with PyTorch's current stream, so that its events time the graph."""
        if self._stream is None:
            self._session.run_with_iobinding(binding)
            return
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        self._session.run_with_iobinding(binding)
        current.wait_stream(self._stream)

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


def _providers(
    side: int, device: torch.device, stream: torch.cuda.Stream | None, *, tensorrt: bool
) -> list[object]:
    if stream is None:
        return [CPU]
    options = {"device_id": device.index or 0, "user_compute_stream": str(stream.cuda_stream)}
    if not tensorrt:
        return [(CUDA, options), CPU]
    compiled = {**options, **batch_profile(side)}
    return [(TENSORRT, compiled), (CUDA, options), CPU]


def pytorch_encoder(checkpoint: Path, dtype: torch.dtype, device: torch.device) -> Encoder:
    """The same network in PyTorch, in the form that is exported."""
    encoder = ImageEncoder(load(checkpoint), dtype).to(device)

    @torch.inference_mode()
    def encode(images: Tensor) -> tuple[Tensor, ...]:
        features: tuple[Tensor, ...] = encoder(images)
        return features

    return encode
