"""What runs the models: the differences that it makes to configs and graph.

Without a choice the configs stay as they are written, and Triton takes the GPU where there is one.
"""

from __future__ import annotations

from enum import Enum

from export.encoder import MAX_BATCH

CACHE = "/var/cache/triton-sam3/tensorrt"
"""The volume of the container's engine cache (docker/); only a server with a GPU looks there."""

ANY_DEVICE = "instance_group [ { count: 1 } ]"

# precision_mode is left out: the graph's own types say what is computed in 16 bits, which is all
# that TensorRT 11 knows (Triton 26.07). Older ones need precision_mode "FP16" besides.
TENSORRT = """
# TensorRT compiles the graph for the GPU it finds: minutes at the first start, read from the cache
# at later ones. ONNX Runtime runs on CUDA what TensorRT does not take.
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
    """ONNX Runtime's execution provider for the encoder, and the decoder's device with it."""

    CUDA = "cuda"
    TENSORRT = "tensorrt"
    """The encoder's graph is of plain operators then: TensorRT would cut it at each of ONNX
    Runtime's own, and finds attention in plain ones by itself."""
    CPU = "cpu"


def place(config: str, accelerator: Accelerator) -> str:
    """The config of a model that runs where the accelerator is."""
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
    """ONNX Runtime's options by which TensorRT knows the batches to compile the encoder for."""
    return {
        f"trt_profile_{bound}_shapes": f"image:{batch}x{image_size}x{image_size}x3"
        for bound, batch in (("min", 1), ("opt", 1), ("max", MAX_BATCH))
    }
