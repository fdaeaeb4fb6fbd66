"""The decoder's settings from config.pbtxt, read and checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from program import first_line
from prompts import Limits

PROGRAM = "decoder.pt2"
TYPES = {"TYPE_FP32": torch.float32, "TYPE_FP16": torch.float16}
"""Accepted embedding types."""

Number = TypeVar("Number", int, float)


class SettingError(ValueError):
    """A setting that cannot be used; the message says which and what is accepted."""


@dataclass(frozen=True)
class Settings:
    """One instance's settings."""

    limits: Limits
    kept_images_bytes: int
    kept_images_idle_seconds: float
    device: torch.device
    program: Path
    feature_shapes: Mapping[str, tuple[int, ...]]
    """Shapes of one image's embeddings."""
    feature_dtype: torch.dtype

    @classmethod
    def from_config(cls, args: Mapping[str, str], config: Mapping[str, Any]) -> Settings:
        """Read Triton's arguments to `initialize` and the model's config. Raises `SettingError`."""
        parameters = {k: v["string_value"] for k, v in config.get("parameters", {}).items()}
        shapes = {t["name"]: tuple(int(size) for size in t["dims"]) for t in config["input"]}
        return cls(
            limits=Limits(
                max_objects=_number(parameters, "max_objects", int, at_least=1),
                max_tokens=_number(parameters, "max_tokens", int, at_least=1),
                mask_size=shapes["mask_input"][-1],
            ),
            kept_images_bytes=_number(parameters, "kept_images_bytes", int, at_least=0),
            kept_images_idle_seconds=_number(
                parameters, "kept_images_idle_seconds", float, at_least=1
            ),
            device=_device(args["model_instance_kind"], args["model_instance_device_id"]),
            program=Path(args["model_repository"]) / args["model_version"] / PROGRAM,
            feature_shapes=shapes,
            feature_dtype=_dtype(config),
        )


def _number(
    parameters: Mapping[str, str], name: str, kind: Callable[[str], Number], *, at_least: int
) -> Number:
    accepted = f"a {'whole ' if kind is int else ''}number of at least {at_least}"
    if name not in parameters:
        raise SettingError(f"config.pbtxt has no parameter {name}; give {accepted}")
    try:
        value = kind(parameters[name])
    except ValueError:
        value = None
    if value is None or not value >= at_least:  # also NaN
        raise SettingError(f"parameter {name} is {parameters[name]!r}; it must be {accepted}")
    return value


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The type of the embeddings, which is the same for all of them."""
    kinds = {t["name"]: t["data_type"] for t in config["input"]}
    try:
        return TYPES[kinds["image_embed"]]
    except KeyError:
        raise SettingError(
            f"image_embed is {kinds['image_embed']} in config.pbtxt; accepted are "
            f"{' and '.join(TYPES)}: export it again"
        ) from None


def _device(kind: str, number: str) -> torch.device:
    if kind != "GPU":
        return torch.device("cpu")
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (AssertionError, RuntimeError) as error:  # torch without CUDA; no GPU or an old driver
        raise SettingError(
            f"config.pbtxt asks for a GPU (KIND_GPU), but torch {torch.__version__} has none: "
            f"{first_line(error)}; fix that, or use KIND_CPU"
        ) from error
    if number != "0":
        raise SettingError(
            f"GPU {number} is not supported: kept images live in one instance, so each server uses "
            "one GPU; start a server for each, with CUDA_VISIBLE_DEVICES"
        )
    return torch.device("cuda:0")
