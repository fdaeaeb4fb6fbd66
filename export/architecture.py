"""The sizes of SAM 3's interactive path, and Meta's modules built to them.

Every size of the model is declared here, once. Whatever a checkpoint reveals is read from it
(`Architecture.from_weights`), so that a small model of the same architecture goes through the same
code as the official one; sizes that leave no trace in a checkpoint are defaults of the dataclass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from sam3.model.necks import Sam3DualViTDetNeck
from sam3.model.vitdet import ViT
from sam3.sam.mask_decoder import MaskDecoder
from sam3.sam.prompt_encoder import PromptEncoder
from sam3.sam.transformer import TwoWayTransformer
from torch import Tensor, nn

TRUNK = "detector.backbone.vision_backbone.trunk."
NECK = "detector.backbone.vision_backbone.sam2_convs."
PROMPT_ENCODER = "tracker.sam_prompt_encoder."
MASK_DECODER = "tracker.sam_mask_decoder."
NO_MEM_EMBED = "tracker.no_mem_embed"

LOGIT_LIMIT = 32.0
"""An answer's logits are clamped to ±32 before they serve as a mask prompt, as by Meta."""


class SizeError(ValueError):
    """Sizes that no SAM 3 model can have; the message says which."""


@dataclass(frozen=True)
class Architecture:
    """Sizes of one SAM 3 model; the defaults are the published one's. Raises `SizeError`."""

    image_size: int = 1008
    """S: side of the encoder's square input, in pixels."""
    patch_size: int = 14
    pretrain_image_size: int = 336
    """The absolute position embedding covers this many pixels and is tiled beyond."""
    embed_dim: int = 1024
    depth: int = 32
    num_heads: int = 16
    mlp_dim: int = 4736
    window_size: int = 24
    """Side of an attention window, in patches."""
    global_att_blocks: tuple[int, ...] = (7, 15, 23, 31)
    d_model: int = 256
    """Channels of the image embedding and of the prompt tokens."""
    decoder_depth: int = 2
    decoder_num_heads: int = 8
    decoder_mlp_dim: int = 2048
    iou_head_hidden_dim: int = 256
    mask_in_chans: int = 16
    num_multimask_outputs: int = 3

    def __post_init__(self) -> None:
        if self.image_size <= 0 or self.image_size % self.patch_size:
            raise SizeError(
                f"image size {self.image_size} is not a positive multiple of the patch size "
                f"{self.patch_size}; the nearest: "
                f"{', '.join(map(str, self._nearest_image_sizes()))}"
            )
        # Rotary embedding rotates pairs of channels in two dimensions.
        if self.embed_dim % (4 * self.num_heads):
            raise SizeError(
                f"{self.embed_dim} channels cannot be split among {self.num_heads} heads in "
                "multiples of 4"
            )
        # The mask decoder's cross-attention works at half the width.
        if self.d_model % (2 * self.decoder_num_heads):
            raise SizeError(
                f"d_model {self.d_model} is not a multiple of {2 * self.decoder_num_heads}"
            )

    def _nearest_image_sizes(self) -> list[int]:
        below = max(0, self.image_size // self.patch_size) * self.patch_size
        return [size for size in (below, below + self.patch_size) if size > 0]

    @property
    def grid(self) -> int:
        """E: side of the image embedding, in patches."""
        return self.image_size // self.patch_size

    @property
    def mask_size(self) -> int:
        """M: side of the low-resolution mask logits."""
        return 4 * self.grid

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor]) -> Architecture:
        """Read the sizes from a state dict in the official layout (see `checkpoint.load`).

        The rotary tables (`freqs_cis`) give head size, window size, global blocks and image size;
        a checkpoint without any is assumed to match the published model in those respects, if it is
        as wide and as deep.

        Raises `KeyError` with the name of a missing weight, `SizeError` if the weights' shapes
        contradict each other or do not say enough.
        """
        embed_dim, _, _, patch_size = _shape(weights, TRUNK + "patch_embed.proj.weight", 4)
        _, positions, _ = _shape(weights, TRUNK + "pos_embed", 3)
        layers = MASK_DECODER + "transformer.layers."
        sizes: dict[str, Any] = {
            "patch_size": patch_size,
            # One position belongs to the class token.
            "pretrain_image_size": math.isqrt(max(0, positions - 1)) * patch_size,
            "embed_dim": embed_dim,
            "depth": _count(weights, TRUNK + "blocks."),
            "mlp_dim": _shape(weights, TRUNK + "blocks.0.mlp.fc1.weight", 2)[0],
            "d_model": _shape(weights, MASK_DECODER + "mask_tokens.weight", 2)[1],
            "decoder_depth": _count(weights, layers),
            "decoder_mlp_dim": _shape(weights, layers + "0.mlp.lin1.weight", 2)[0],
            "iou_head_hidden_dim": _shape(
                weights, MASK_DECODER + "iou_prediction_head.layers.0.weight", 2
            )[0],
            "mask_in_chans": _shape(weights, PROMPT_ENCODER + "mask_downscaling.3.weight", 4)[0],
        }
        return cls(**sizes, **_rotary_sizes(weights, **sizes))


def _rotary_sizes(
    weights: Mapping[str, Tensor], *, patch_size: int, embed_dim: int, depth: int, **_: int
) -> dict[str, Any]:
    """Sizes that only the rotary tables [tokens, head size / 2] give; empty if there are none."""
    keys = [f"{TRUNK}blocks.{i}.attn.freqs_cis" for i in range(depth)]
    if not any(key in weights for key in keys):
        _check_published(embed_dim, depth)
        return {}
    shapes = [_shape(weights, key, 2) for key in keys]
    # The last block is always global; the others have the tokens of one window.
    tokens = [count for count, _ in shapes]
    windows = [count for count in tokens if count != tokens[-1]] or tokens
    return {
        "num_heads": max(1, embed_dim // max(1, 2 * shapes[0][1])),
        "image_size": math.isqrt(tokens[-1]) * patch_size,
        "window_size": math.isqrt(windows[0]),
        "global_att_blocks": tuple(i for i, n in enumerate(tokens) if n == tokens[-1]),
    }


def _check_published(embed_dim: int, depth: int) -> None:
    published = Architecture()
    if (embed_dim, depth) != (published.embed_dim, published.depth):
        raise SizeError(
            f"a trunk of {depth} blocks and {embed_dim} channels without rotary tables "
            f"({TRUNK}blocks.*.attn.freqs_cis), which give its heads and windows; without them "
            f"only the published trunk ({published.depth} blocks, {published.embed_dim} channels) "
            "is known: save the checkpoint with the tables"
        )


def _shape(weights: Mapping[str, Tensor], key: str, axes: int) -> list[int]:
    shape = list(weights[key].shape)
    if len(shape) != axes or 0 in shape:
        raise SizeError(f"{key} has shape {shape}, expected {axes} axes")
    return shape


def _count(weights: Mapping[str, Tensor], prefix: str) -> int:
    """The number of numbered modules under a prefix."""
    numbers = {key.removeprefix(prefix).split(".")[0] for key in weights if key.startswith(prefix)}
    return len(numbers)


class InteractiveModel(nn.Module):
    """Meta's modules of the interactive path, and nothing else of SAM 3.

    Left out because points, boxes and masks never reach them: the detector and its neck, the
    neck's half-size level, the text encoder and the tracker's memory.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.trunk = build_trunk(architecture)
        self.neck = Sam3DualViTDetNeck(
            trunk=self.trunk,
            position_encoding=nn.Identity(),
            d_model=architecture.d_model,
            scale_factors=(4.0, 2.0, 1.0),
            add_sam2_neck=True,
        ).sam2_convs
        self.prompt_encoder = _prompt_encoder(architecture)
        self.mask_decoder = build_mask_decoder(architecture)
        self.no_mem_embed = nn.Parameter(torch.zeros(1, 1, architecture.d_model))

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embed normalised images (FP32 [B, 3, S, S], mean and standard deviation 0.5).

        Returns image_embed [B, d_model, E, E], high_res_feats_0 [B, d_model/8, 4E, 4E] and
        high_res_feats_1 [B, d_model/4, 2E, 2E].
        """
        (tokens,) = self.trunk(images)
        fine, middle, coarse = (level(tokens) for level in self.neck)
        return (
            coarse + self.no_mem_embed.view(1, -1, 1, 1),
            self.mask_decoder.conv_s0(fine),
            self.mask_decoder.conv_s1(middle),
        )

    def layout(self) -> dict[str, nn.Module]:
        """Prefixes of each module's weights in the official checkpoint."""
        return {
            TRUNK: self.trunk,
            NECK: self.neck,
            PROMPT_ENCODER: self.prompt_encoder,
            MASK_DECODER: self.mask_decoder,
        }


def build_trunk(a: Architecture) -> ViT:
    """Meta's ViT as SAM 3 configures it."""
    return ViT(
        img_size=a.image_size,
        pretrain_img_size=a.pretrain_image_size,
        patch_size=a.patch_size,
        embed_dim=a.embed_dim,
        depth=a.depth,
        num_heads=a.num_heads,
        # Meta rounds embed_dim · mlp_ratio down; the extra half unit prevents one too few.
        mlp_ratio=(a.mlp_dim + 0.5) / a.embed_dim,
        norm_layer="LayerNorm",
        qkv_bias=True,
        use_abs_pos=True,
        tile_abs_pos=True,
        global_att_blocks=a.global_att_blocks,
        rel_pos_blocks=(),
        use_rope=True,
        use_interp_rope=True,
        window_size=a.window_size,
        pretrain_use_cls_token=True,
        retain_cls_token=False,
        ln_pre=True,
        ln_post=False,
        return_interm_layers=False,
        bias_patch_embed=False,
    )


def _prompt_encoder(a: Architecture) -> PromptEncoder:
    return PromptEncoder(
        embed_dim=a.d_model,
        image_embedding_size=(a.grid, a.grid),
        input_image_size=(a.image_size, a.image_size),
        mask_in_chans=a.mask_in_chans,
    )


def build_mask_decoder(a: Architecture) -> MaskDecoder:
    """Meta's mask decoder as SAM 3 configures it."""
    return MaskDecoder(
        num_multimask_outputs=a.num_multimask_outputs,
        transformer=TwoWayTransformer(
            depth=a.decoder_depth,
            embedding_dim=a.d_model,
            mlp_dim=a.decoder_mlp_dim,
            num_heads=a.decoder_num_heads,
        ),
        transformer_dim=a.d_model,
        iou_head_depth=3,
        iou_head_hidden_dim=a.iou_head_hidden_dim,
        use_high_res_features=True,
        iou_prediction_use_sigmoid=True,
        pred_obj_scores=True,
        pred_obj_scores_mlp=True,
        use_multimask_token_for_obj_ptr=True,
        dynamic_multimask_via_stability=True,
        dynamic_multimask_stability_delta=0.05,
        dynamic_multimask_stability_thresh=0.98,
    )
