"""Strict loading: one sentence says what is wrong with a file, with names."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sam3 import model_builder
from sam3.model.sam3_tracker_base import Sam3TrackerBase
from sam3.model.vitdet import ViT
from torch import Tensor, nn

from export import checkpoint
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
from export.checkpoint import ROTARY_TABLE, CheckpointError
from tests.export import tiny

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def weights(tiny_checkpoint: Path) -> Weights:
    read: Weights = torch.load(tiny_checkpoint)["model"]
    return read


def refusal(path: Path) -> str:
    """The message with which a file is rejected; it names the file and has one line."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    sentence = str(caught.value)
    assert sentence.startswith(f"{path}: ")
    assert "\n" not in sentence
    assert "\033" not in sentence
    return sentence.removeprefix(f"{path}: ")


def saved(weights: object, folder: Path) -> Path:
    torch.save(weights, folder / "sam3.pt")
    return folder / "sam3.pt"


def test_a_saved_model_is_loaded_unchanged(tmp_path: Path, model: InteractiveModel) -> None:
    checkpoint.save(model, tmp_path / "sam3.pt")
    loaded = checkpoint.load(tmp_path / "sam3.pt")
    assert loaded.architecture == model.architecture
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, expected[key]), key
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_loaded_as_fp32(
    tmp_path: Path, model: InteractiveModel, dtype: torch.dtype
) -> None:
    checkpoint.save(model, tmp_path / "sam3.pt", dtype)
    loaded = checkpoint.load(tmp_path / "sam3.pt")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs.to(dtype).float())


def test_weights_of_the_rest_of_sam3_are_ignored(tmp_path: Path, weights: Weights) -> None:
    more = {
        "detector.backbone.vision_backbone.convs.0.conv_1x1.weight": torch.zeros(1),
        "detector.transformer.decoder.layers.0.linear1.weight": torch.zeros(1),
        "tracker.maskmem_backbone.mask_downsampler.encoder.0.weight": torch.zeros(1),
    }
    loaded = checkpoint.load(saved({"model": weights | more}, tmp_path))
    assert loaded.architecture == tiny.ARCHITECTURE


def test_weights_may_be_at_the_top_level_or_in_safetensors(
    tmp_path: Path, weights: Weights
) -> None:
    assert checkpoint.load(saved(weights, tmp_path)).architecture == tiny.ARCHITECTURE
    # safetensors has no complex numbers: without the tables only the published model is known.
    real = {k: v.contiguous() for k, v in weights.items() if not k.endswith(ROTARY_TABLE)}
    save_file(real, tmp_path / "sam3.safetensors")
    assert "2 blocks and 48 channels without rotary tables" in refusal(
        tmp_path / "sam3.safetensors"
    )


def test_another_image_size(tiny_checkpoint: Path) -> None:
    loaded = checkpoint.load(tiny_checkpoint, image_size=154)
    assert loaded.architecture == tiny.resized(154)
    assert [t.shape[-1] for t in loaded.encode(torch.zeros(1, 3, 154, 154))] == [11, 44, 22]
    with pytest.raises(SizeError, match="nearest: 140, 154"):
        checkpoint.load(tiny_checkpoint, image_size=150)


def test_another_size_of_a_checkpoint_whose_windows_fill_the_image_is_rejected(
    tmp_path: Path,
) -> None:
    """All its rotary tables are equally long: which blocks have windows cannot be read."""
    path = tmp_path / "sam3.pt"
    tiny.save(path, tiny.resized(56))
    assert checkpoint.load(path, image_size=56).architecture.image_size == 56
    with pytest.raises(SizeError, match=r"112 is not possible: .* made for 56, windows and image"):
        checkpoint.load(path, image_size=112)


def _some(weights: Weights) -> list[str]:
    """The weights that sizes are read from, and some of the others."""
    sized = (
        *("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight", "mask_tokens.weight"),
        *("layers.0.mlp.lin1.weight", "iou_prediction_head.layers.0.weight", NO_MEM_EMBED),
        "mask_downscaling.3.weight",
    )
    keys = sorted(key for key in weights if not key.endswith(ROTARY_TABLE))
    return [key for i, key in enumerate(keys) if key.endswith(sized) or i % 30 == 0]


def test_every_weight_is_needed(tmp_path: Path, weights: Weights) -> None:
    for missing in _some(weights):
        rest = {key: value for key, value in weights.items() if key != missing}
        sentence = refusal(saved(rest, tmp_path))
        assert missing in sentence, sentence
        assert "lacks" in sentence or "missing" in sentence


@pytest.mark.parametrize("change", ["flat", "doubled", "empty"])
def test_a_wrong_shape_of_any_weight_is_rejected(
    tmp_path: Path, weights: Weights, change: str
) -> None:
    """Whatever sizes a wrong shape gives, the result is an error message."""
    for key in _some(weights):
        value = weights[key]
        wrong = {
            "flat": value.flatten()[:-1],
            "doubled": torch.cat((value, value)),
            "empty": value[..., :0],
        }
        refusal(saved({**weights, key: wrong[change]}, tmp_path))


def test_a_wrong_shape_is_named_with_what_is_needed(tmp_path: Path, weights: Weights) -> None:
    wrong = {**weights, NO_MEM_EMBED: torch.zeros(1, 1, 63)}
    assert refusal(saved(wrong, tmp_path)) == (
        f"{NO_MEM_EMBED} has shape [1, 1, 63]; the other weights need [1, 1, 64]"
    )


def test_several_missing_weights_are_counted(tmp_path: Path, weights: Weights) -> None:
    rest = {k: v for k, v in weights.items() if ".iou_prediction_head.layers.2" not in k}
    assert refusal(saved(rest, tmp_path)) == (
        "lacks tracker.sam_mask_decoder.iou_prediction_head.layers.2.bias and 1 more"
    )


@pytest.mark.parametrize(
    "name",
    [
        "detector.backbone.vision_backbone.trunk.blocks.0.attn.qkv.lora_A.weight",
        "detector.backbone.vision_backbone.trunk.blocks.0.ls1.gamma",
        f"{NECK}0.conv_1x1.lora_A.weight",
        f"{NECK}2.adapter.weight",
        "tracker.sam_prompt_encoder.adapter.weight",
        "tracker.sam_mask_decoder.adapter.weight",
    ],
)
def test_weights_that_the_export_would_lose_are_rejected(
    tmp_path: Path, weights: Weights, name: str
) -> None:
    more = {name: torch.zeros(1)}
    assert refusal(saved(weights | more, tmp_path)).startswith(f"holds {name}, which SAM 3")
    more |= {f"{name}.{i}": torch.zeros(1) for i in range(2)}
    assert refusal(saved(weights | more, tmp_path)).startswith(f"holds {name} and 2 more, which")


def test_the_unused_level_of_the_neck_is_ignored(tmp_path: Path, weights: Weights) -> None:
    more = {f"{NECK}3.conv_1x1.weight": torch.zeros(1)}
    assert checkpoint.load(saved(weights | more, tmp_path)).architecture == tiny.ARCHITECTURE


def test_every_weight_of_metas_own_modules_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Meta's model builder makes them, but narrow; sam3.pt has exactly these weights."""
    narrow = {"embed_dim": 64, "img_size": 112}
    monkeypatch.setattr(model_builder, "ViT", lambda **options: ViT(**options | narrow))
    tracker = Sam3TrackerBase.__new__(Sam3TrackerBase)
    nn.Module.__init__(tracker)
    tracker.hidden_dim, tracker.mem_dim = 256, 64
    tracker.image_size, tracker.backbone_stride = 1008, 14
    tracker.sam_mask_decoder_extra_args = {"dynamic_multimask_via_stability": True}
    tracker._build_sam_heads()
    metas = {
        TRUNK: model_builder._create_vit_backbone(),
        PROMPT_ENCODER: tracker.sam_prompt_encoder,
    }
    metas[MASK_DECODER] = tracker.sam_mask_decoder
    ours = InteractiveModel(Architecture(image_size=112, embed_dim=64)).layout()
    for prefix, module in metas.items():
        assert module.state_dict().keys() == ours[prefix].state_dict().keys()


def _hugging_face(_: Weights) -> Weights:
    names = (
        "detector_model.vision_encoder.backbone.embeddings.position_embeddings",
        "tracker_model.mask_decoder.iou_token.weight",
        "tracker_neck.fpn_layers.0.proj1.weight",
    )
    return {name: torch.zeros(1) for name in names}


def _sam31(weights: Weights) -> Weights:
    renames = {
        "tracker.sam_": "tracker.model.interactive_sam_",
        ".sam2_convs.": ".interactive_convs.",
        "tracker.no_mem": "tracker.model.no_mem",
    }
    for old, new in renames.items():
        weights = {key.replace(old, new): value for key, value in weights.items()}
    return weights


def _sam2(_: Weights) -> Weights:
    names = ("image_encoder.trunk.pos_embed", "sam_mask_decoder.iou_token.weight", "no_mem_embed")
    return {name: torch.zeros(1) for name in names}


def _fine_tuned(weights: Weights) -> Weights:
    return {k: v for k, v in weights.items() if k.startswith("detector.") and "sam2" not in k}


LOOKS_LIKE: dict[str, tuple[Callable[[Weights], Weights], str, str]] = {
    "Hugging Face": (_hugging_face, "Hugging Face's conversion", "tracker.sam_mask_decoder.*"),
    "SAM 3.1": (_sam31, "SAM 3.1", "detector.backbone.vision_backbone.sam2_convs.*"),
    "SAM 2": (_sam2, "SAM 1 or SAM 2", "detector.backbone.vision_backbone.trunk.*"),
    "fine-tuned": (_fine_tuned, "without the interactive head", NO_MEM_EMBED),
    "another model": (lambda _: {"fc.weight": torch.zeros(1)}, "does not look like", NO_MEM_EMBED),
}


@pytest.mark.parametrize("kind", LOOKS_LIKE)
def test_another_layout_is_named_with_what_is_missing(
    tmp_path: Path, weights: Weights, kind: str
) -> None:
    make, looks, missing = LOOKS_LIKE[kind]
    sentence = refusal(saved({"model": make(weights)}, tmp_path))
    assert looks in sentence
    assert missing in sentence.partition("missing: ")[2].partition(". Expected")[0]


def _cut(path: Path, weights: Weights) -> None:
    torch.save({"model": weights}, path)
    path.write_bytes(path.read_bytes()[:-1000])


def _zip_text(path: Path, _: Weights) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("text", "no weights " * 1000)


def _damage_compressed(path: Path, weights: Weights) -> None:
    _zip_text(path, weights)
    octets = bytearray(path.read_bytes())
    octets[34] ^= 0xFF  # the first compressed byte: headers come before
    path.write_bytes(octets)


NO_CHECKPOINTS: dict[str, tuple[Callable[[Path, Weights], object], str]] = {
    "text": (lambda p, _: p.write_text("version https://git-lfs"), "not a zip archive"),
    "empty": (lambda p, _: p.touch(), "not a zip archive"),
    "plain pickle": (lambda p, _: p.write_bytes(pickle.dumps({"a": 1})), "not a zip archive"),
    "truncated": (_cut, "damaged, incomplete"),
    "another zip": (_zip_text, "or another kind of zip archive"),
    "a damaged compressed zip": (_damage_compressed, "damaged, incomplete"),
    "other objects": (lambda p, w: torch.save({"model": w, "at": p}, p), "Python objects besides"),
    "a module": (lambda p, _: torch.save(torch.nn.Linear(1, 1), p), "Python objects besides"),
    "a list": (lambda p, _: torch.save([1, 2], p), "holds no weights by name"),
    "numbers for names": (lambda p, w: torch.save(dict(enumerate(w.values())), p), "does not look"),
    "no tensors": (lambda p, _: torch.save({"model": {"a": 1}}, p), "holds no weights by name"),
    "a folder": (lambda p, _: p.mkdir(), "is a folder"),
    "nothing": (lambda *_: None, "no such file"),
}


@pytest.mark.parametrize("kind", NO_CHECKPOINTS)
def test_a_file_that_is_not_a_checkpoint_is_rejected(
    tmp_path: Path, weights: Weights, kind: str
) -> None:
    make, reason = NO_CHECKPOINTS[kind]
    make(tmp_path / "sam3.pt", weights)
    assert reason in refusal(tmp_path / "sam3.pt")


def test_an_impossible_path_is_rejected(tmp_path: Path) -> None:
    assert "cannot be read (File name too long)" in refusal(tmp_path / ("x" * 300))


def test_a_damaged_weight_is_rejected(tmp_path: Path, weights: Weights) -> None:
    """Bits that flipped in transit, which torch would load."""
    path = saved(weights, tmp_path)
    octets = bytearray(path.read_bytes())
    largest = max(weights.values(), key=lambda weight: weight.nbytes)
    place = octets.index(largest.numpy().tobytes())
    octets[place + 100] ^= 1
    path.write_bytes(octets)
    sentence = refusal(path)
    assert sentence.startswith("damaged: ")
    assert sentence.endswith("does not match; copy or download it again")


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x10" + b"\0" * 7 + b"garbage garbage!"])
def test_a_file_that_is_not_safetensors_is_rejected(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert "not a safetensors file" in refusal(path)
