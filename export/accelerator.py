"""What runs the models, and what that changes in the configs and the graph.

Without a choice the configs stay as written, and Triton uses the GPU if there is one.
"""

from __future__ import annotations

from enum import Enum

from export.encoder import MAX_BATCH

CACHE = "/var/cache/triton-sam3/tensorrt"
"""The container's volume for the engine cache (docker/); only a server with a GPU uses it."""

ANY_DEVICE = "instance_group [ { count: 1 } ]"

# precision_mode is left out: the graph's own types say what is computed in 16 bits, and TensorRT 11
# (Triton 26.07) knows nothing else. Older versions also need precision_mode "FP16".
TENSORRT = """
# TensorRT compiles the graph for the GPU it finds: that takes minutes at the first start, and later
# starts read the cache. ONNX Runtime runs on CUDA what TensorRT does not support.
optimization {{ execution_accelerators {{
  gpu_execution_accelerator : [ {{
    name : "tensorrt"
    parameters {{ key: "trt_engine_cache_enable" value: "1" }}
    parameters {{ key: "trt_engine_cache_path" value: "{cache}" }}
    parameters {{ key: "trt_timing_cache_enable" value: "1" }}
    parameters {{ key: "trt_timing_cache_path" value: "{cache}" }}
    {profile}
  }} ]
}} }}
"""


class Accelerator(str, Enum):
    """ONNX Runtime's execution provider for the encoder, which also sets the decoder's device."""

    CUDA = "cuda"
    TENSORRT = "tensorrt"
    """The encoder's graph then has plain operators only: TensorRT would split it at each of ONNX
    Runtime's own, and recognises attention in plain ones."""
    CPU = "cpu"


def place(config: str, accelerator: Accelerator) -> str:
    """The config of a model, placed on the accelerator's device."""
    assert ANY_DEVICE in config
    kind = "KIND_CPU" if accelerator is Accelerator.CPU else "KIND_GPU"
    return config.replace(ANY_DEVICE, f"instance_group [ {{ count: 1 kind: {kind} }} ]")


def compiled_by_tensorrt(config: str, image_size: int) -> str:
    """The encoder's config with TensorRT in front of CUDA."""
    profile = "\n    ".join(
        f'parameters {{ key: "{option}" value: "{shapes}" }}'
        for option, shapes in batch_profile(image_size).items()
    )
    return config + TENSORRT.format(cache=CACHE, profile=profile)


def batch_profile(image_size: int) -> dict[str, str]:
    """ONNX Runtime's options that tell TensorRT which batches to compile the encoder for."""
    return {
        f"trt_profile_{bound}_shapes": f"image:{batch}x{image_size}x{image_size}x3"
        for bound, batch in (("min", 1), ("opt", 1), ("max", MAX_BATCH))
    }
