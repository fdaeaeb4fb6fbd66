"""Strict conversion between checkpoint files and `InteractiveModel`: errors name the weight."""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections.abc import Mapping, Set
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from export.architecture import (
    MASK_DECODER,
    NECK,
    NO_MEM_EMBED,
    PROMPT_ENCODER,
    TRUNK,
    Architecture,
    InteractiveModel,
    SizeError,
)

ROTARY_TABLE = "freqs_cis"
"""Suffix of buffers that are computed from the sizes, not loaded."""

UNUSED_LEVEL = f"{NECK}3."
"""The neck's half-size level, which SAM 3 has and the interactive path does not use."""

ZIP_MAGIC = b"PK\x03\x04"

WANTED = (
    f"{TRUNK}*, {NECK}*, {PROMPT_ENCODER}*, {MASK_DECODER}* and {NO_MEM_EMBED} "
    "(the layout of Meta's sam3.pt)"
)


class CheckpointError(Exception):
    """A file that cannot be used as a SAM 3 checkpoint; the message says why and what is needed."""


def load(path: Path, image_size: int | None = None) -> InteractiveModel:
    """Build the interactive model of a checkpoint in the official layout, in FP32, on the CPU.

    `image_size` replaces the size that the checkpoint was made for: the rotary tables are
    interpolated and the position embedding is tiled, as Meta's ViT does.

    Raises `CheckpointError` for a file that is missing, unreadable, incomplete, in another layout
    or has weights that SAM 3 does not have, and `SizeError` for an image size that is not a
    multiple of the patch size, or if the weights do not say which blocks have windows at that size.
    """
    weights = read(path)
    architecture = _architecture(path, weights)
    if image_size is not None:
        architecture = _at_size(architecture, image_size)
    model = InteractiveModel(architecture)
    _assign(path, model, weights)
    return model.eval().requires_grad_(False)


def _at_size(architecture: Architecture, image_size: int) -> Architecture:
    """The same for another image size.

    If the rotary tables of all blocks are equally long, a window may be as large as the image that
    the checkpoint was made for: which blocks are global at another size is then unknown.
    """
    every_block = len(architecture.global_att_blocks) == architecture.depth
    if every_block and image_size != architecture.image_size:
        raise SizeError(
            f"the image size {image_size} is not possible: in this checkpoint, made for "
            f"{architecture.image_size}, windows and image have the same size, so its weights do "
            "not say which blocks have windows; use a checkpoint made for larger images"
        )
    return replace(architecture, image_size=image_size)


def read(path: Path) -> dict[str, Tensor]:
    """Read the interactive path's weights from a checkpoint file, memory-mapped and unconverted."""
    weights = _unpickle(path)
    wanted = {
        key: value
        for key, value in weights.items()
        if key == NO_MEM_EMBED or key.startswith((TRUNK, NECK, PROMPT_ENCODER, MASK_DECODER))
    }
    absent = [
        name
        for name in (TRUNK, NECK, PROMPT_ENCODER, MASK_DECODER, NO_MEM_EMBED)
        if not any(key.startswith(name) for key in wanted)
    ]
    if absent:
        raise CheckpointError(_explain_absent(path, weights, absent))
    return wanted


def save(model: InteractiveModel, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a model in the official layout, with the rotary tables, which carry the sizes."""
    weights = {NO_MEM_EMBED: model.no_mem_embed}
    for prefix, module in model.layout().items():
        weights |= {prefix + key: value for key, value in module.state_dict().items()}
    stored = {
        key: value.detach().to(dtype if value.is_floating_point() else value.dtype)
        for key, value in weights.items()
    }
    torch.save({"model": stored}, path)


def _unpickle(path: Path) -> Mapping[str, Tensor]:
    _check_file(path)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    weights = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not any(isinstance(v, Tensor) for v in weights.values()):
        raise CheckpointError(f"{path}: holds no weights by name; expected {WANTED}")
    named = ((k, v) for k, v in weights.items() if isinstance(k, str) and isinstance(v, Tensor))
    return dict(named)


def _check_file(path: Path) -> None:
    try:
        if path.is_file():
            return
        found = "is a folder" if path.is_dir() else "no such file"
    except OSError as error:  # path too long or folder not accessible
        found = f"cannot be read ({error.strerror})"
    raise CheckpointError(f"{path}: {found}; give the path of a SAM 3 checkpoint (sam3.pt)")


def _read_torch(path: Path) -> object:
    try:
        with path.open("rb") as file:
            if file.read(len(ZIP_MAGIC)) != ZIP_MAGIC:
                raise CheckpointError(_unreadable(path, "not a zip archive from torch.save"))
        _check_intact(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = "it is damaged or holds Python objects besides the weights, which are not loaded"
        raise CheckpointError(_unreadable(path, reason)) from error
    except (RuntimeError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        reason = "damaged, incomplete or another kind of zip archive"
        raise CheckpointError(_unreadable(path, reason)) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


def _check_intact(path: Path) -> None:
    """Verify checksums, which torch does not do: a damaged weight would merely give wrong masks.

    The export's own check would not catch it either, as it uses the same weights as the reference.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise CheckpointError(
            f"{path}: damaged: the checksum of {damaged} in it does not match; copy or download it "
            "again"
        )


def _unreadable(path: Path, reason: str) -> str:
    return f"{path}: not a PyTorch checkpoint ({reason}); expected a file that holds {WANTED}"


def _read_safetensors(path: Path) -> object:
    from safetensors import SafetensorError  # noqa: PLC0415
    from safetensors.torch import load_file  # noqa: PLC0415

    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error})") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


def _explain_absent(path: Path, weights: Mapping[str, Tensor], absent: list[str]) -> str:
    missing = ", ".join(name if name == NO_MEM_EMBED else name + "*" for name in absent)
    return f"{path}: {_kind(weights)}; missing: {missing}. Expected {WANTED}"


def _kind(weights: Mapping[str, Tensor]) -> str:
    """Name what a checkpoint without the wanted keys looks like."""

    def has(*prefixes: str) -> bool:
        return any(key.startswith(prefixes) for key in weights)

    if has("detector_model.", "tracker_model.", "tracker_neck."):
        return "looks like Hugging Face's conversion, whose names differ; use Meta's sam3.pt"
    if has("tracker.model.interactive_sam_") or any(
        ".interactive_convs." in key for key in weights
    ):
        return (
            "looks like SAM 3.1 (multiplex), which has a different click head; use SAM 3's sam3.pt"
        )
    if has("image_encoder.", "sam_mask_decoder.", "memory_attention."):
        return "looks like SAM 1 or SAM 2, not SAM 3"
    if has("detector.", "backbone.", "trunk.", "model.detector."):
        return (
            "looks like a SAM 3 checkpoint without the interactive head, as often saved by "
            "fine-tuning; merge its weights into Meta's sam3.pt"
        )
    return "does not look like a SAM 3 checkpoint"


def _architecture(path: Path, weights: Mapping[str, Tensor]) -> Architecture:
    try:
        return Architecture.from_weights(weights)
    except KeyError as error:
        raise CheckpointError(f"{path}: lacks {error.args[0]}") from error
    except SizeError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _first_of(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return names[0] + more


def _check_known(path: Path, others: Set[str]) -> None:
    """Raise on weights that belong to none of Meta's modules, such as those fine-tuning adds.

    Meta's video model loads sam3.pt strictly, so that file has none. `UNUSED_LEVEL` is allowed.
    """
    unknown = sorted(
        k for k in others if not k.startswith(UNUSED_LEVEL) and not k.endswith(ROTARY_TABLE)
    )
    if unknown:
        raise CheckpointError(
            f"{path}: holds {_first_of(unknown)}, which SAM 3 does not have: the export would lose "
            "their effect; merge them into SAM 3's own weights (as is possible for LoRA), or use "
            "Meta's sam3.pt"
        )


def _assign(path: Path, model: InteractiveModel, weights: Mapping[str, Tensor]) -> None:
    """Assign every parameter its weight; raise if one is missing, unknown or of another shape."""
    destinations = {
        prefix + key: value
        for prefix, module in model.layout().items()
        for key, value in module.state_dict().items()
        if not key.endswith(ROTARY_TABLE)
    }
    destinations[NO_MEM_EMBED] = model.no_mem_embed
    missing = sorted(destinations.keys() - weights.keys())
    if missing:
        raise CheckpointError(f"{path}: lacks {_first_of(missing)}")
    _check_known(path, weights.keys() - destinations.keys())
    for key, value in destinations.items():
        if value.shape != weights[key].shape:
            raise CheckpointError(
                f"{path}: {key} has shape {list(weights[key].shape)}; the other weights need "
                f"{list(value.shape)}"
            )
    for prefix, module in model.layout().items():
        own = {k[len(prefix) :]: weights[k].float() for k in destinations if k.startswith(prefix)}
        module.load_state_dict(own, strict=False, assign=True)
    model.no_mem_embed = nn.Parameter(weights[NO_MEM_EMBED].float())
