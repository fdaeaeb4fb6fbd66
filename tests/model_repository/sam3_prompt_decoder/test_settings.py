"""The decoder's settings: the config as written, and every way to get one wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf.json_format import MessageToDict  # type: ignore[import-untyped]
from settings import SettingError, Settings

from export.repository import DECODER, TEMPLATES, read_config

ARGS = {
    "model_instance_kind": "CPU",
    "model_instance_device_id": "0",
    "model_repository": "/models/sam3_prompt_decoder",
    "model_version": "1",
}


def config(**parameters: str | None) -> dict[str, Any]:
    """The written config as Triton passes it, with some parameters changed or removed."""
    message = read_config(TEMPLATES, DECODER)
    written: dict[str, Any] = json.loads(
        json.dumps(MessageToDict(message, preserving_proto_field_name=True))
    )
    for name, value in parameters.items():
        if value is None:
            del written["parameters"][name]
        else:
            written["parameters"][name] = {"string_value": value}
    return written


def test_the_config_as_written() -> None:
    settings = Settings.from_config(ARGS, config())
    assert settings.limits.max_objects == 256
    assert settings.limits.max_tokens == 128
    assert settings.limits.mask_size == settings.feature_shapes["high_res_feats_0"][-1]
    assert settings.kept_images_bytes == 4 * 2**30
    assert settings.kept_images_idle_seconds == 900
    assert settings.device == torch.device("cpu")
    assert settings.program == Path("/models/sam3_prompt_decoder/1/decoder.pt2")


@pytest.mark.parametrize(
    ("kind", "dtype"), [("TYPE_FP32", torch.float32), ("TYPE_FP16", torch.float16)]
)
def test_the_embeddings_type_is_read(kind: str, dtype: torch.dtype) -> None:
    written = config()
    written["input"][0]["data_type"] = kind
    assert Settings.from_config(ARGS, written).feature_dtype == dtype


def test_a_type_that_no_encoder_writes_is_rejected() -> None:
    written = config()
    written["input"][0]["data_type"] = "TYPE_BF16"
    with pytest.raises(SettingError, match=r"TYPE_BF16 in config\.pbtxt; accepted are TYPE_FP32"):
        Settings.from_config(ARGS, written)


def test_numbers_are_read() -> None:
    settings = Settings.from_config(
        ARGS, config(kept_images_bytes="0", kept_images_idle_seconds="1.5")
    )
    assert (settings.kept_images_bytes, settings.kept_images_idle_seconds) == (0, 1.5)


WRONG = {
    "max_objects": ("0", "a whole number of at least 1"),
    "max_tokens": ("many", "a whole number of at least 1"),
    "kept_images_bytes": ("4e9", "a whole number of at least 0"),
    "kept_images_idle_seconds": ("nan", "a number of at least 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_parameter_is_named(name: str) -> None:
    value, accepted = WRONG[name]
    for bad in (value, "", "-1"):
        with pytest.raises(SettingError) as caught:
            Settings.from_config(ARGS, config(**{name: bad}))
        assert str(caught.value) == f"parameter {name} is {bad!r}; it must be {accepted}"


@pytest.mark.parametrize("name", WRONG)
def test_a_missing_parameter_is_named(name: str) -> None:
    with pytest.raises(SettingError) as caught:
        Settings.from_config(ARGS, config(**{name: None}))
    assert str(caught.value) == f"config.pbtxt has no parameter {name}; give {WRONG[name][1]}"


def test_no_parameters_at_all() -> None:
    written = config()
    del written["parameters"]
    with pytest.raises(SettingError, match="has no parameter max_objects"):
        Settings.from_config(ARGS, written)


def test_an_instance_on_a_second_gpu_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton starts one for each GPU, and each would know only its own images."""
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    gpu = {**ARGS, "model_instance_kind": "GPU"}
    assert (
        Settings.from_config({**gpu, "model_instance_device_id": "0"}, config()).device.index == 0
    )
    with pytest.raises(SettingError, match="a server for each, with CUDA_VISIBLE_DEVICES"):
        Settings.from_config({**gpu, "model_instance_device_id": "1"}, config())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_an_error_that_says_so() -> None:
    with pytest.raises(
        SettingError, match=r"asks for a GPU \(KIND_GPU\), but torch .* has none: .+"
    ):
        Settings.from_config({**ARGS, "model_instance_kind": "GPU"}, config())
