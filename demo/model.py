"""The demo model's sizes, initialisation and inference: Meta's modules, called in batches.

features = encode(model, images)
answer = decode(model, features, owner, prompts)      owner: the index of each object's picture
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from sam3.sam.transformer import Attention, TwoWayTransformer
from torch import Tensor, nn
from torch.nn import functional

from export.architecture import LOGIT_LIMIT, Architecture, InteractiveModel

ARCHITECTURE = Architecture(
    image_size=392,
    pretrain_image_size=392,
    embed_dim=192,
    depth=6,
    num_heads=6,
    mlp_dim=768,
    window_size=7,
    global_att_blocks=(1, 3, 5),
    decoder_mlp_dim=512,
)


Features = tuple[Tensor, Tensor, Tensor]
"""image_embed, high_res_feats_0 and high_res_feats_1 of B pictures (`InteractiveModel.encode`)."""


@dataclass(frozen=True)
class Prompts:
    """Prompts of N objects with P tokens each."""

    coords: Tensor
    """FP32 [N, P, 2]: x, y in input pixels; a box's two corners come first."""
    labels: Tensor
    """INT32 [N, P]: 1 positive, 0 negative, 2 and 3 a box's corners."""
    masks: Tensor | None = None
    """FP32 [N, 1, M, M]: logits of an earlier answer."""

    @classmethod
    def from_boxes(cls, corners: Tensor) -> Prompts:
        """One box per object: FP32 [N, 2, 2]."""
        return cls(corners, torch.tensor([[2, 3]], dtype=torch.int32).repeat(len(corners), 1))

    def corrected(self, clicks: Tensor, labels: Tensor, logits: Tensor) -> Prompts:
        """Add a click per object, FP32 [N, 2] and INT32 [N], and the last answer's [N, M, M]."""
        return Prompts(
            torch.cat([self.coords, clicks[:, None]], 1),
            torch.cat([self.labels, labels[:, None]], 1),
            logits[:, None].clamp(-LOGIT_LIMIT, LOGIT_LIMIT),
        )

    def __getitem__(self, index: slice) -> Prompts:
        masks = None if self.masks is None else self.masks[index]
        return Prompts(self.coords[index], self.labels[index], masks)


@dataclass(frozen=True)
class Answer:
    """The decoder's output for N objects; candidate 0 is the single-mask one."""

    logits: Tensor
    """FP32 [N, 4, M, M]"""
    ious: Tensor
    """FP32 [N, 4], predicted."""

    @property
    def best(self) -> Tensor:
        """INT64 [N]: the multimask candidate (1, 2 or 3) predicted to be the best."""
        return self.ious[:, 1:].argmax(1) + 1

    def candidate(self, chosen: Tensor) -> Tensor:
        """FP32 [N, M, M]: the candidate of each object with the given number, INT64 [N]."""
        return self.logits[torch.arange(len(chosen)), chosen]


def sized(image_size: int) -> Architecture:
    """The demo model's architecture for a different input size."""
    return replace(ARCHITECTURE, image_size=image_size, pretrain_image_size=image_size)


def build(seed: int, image_size: int) -> InteractiveModel:
    """An untrained demo model, initialised so that it learns quickly."""
    torch.manual_seed(seed)
    model = InteractiveModel(sized(image_size))
    model.trunk.use_act_checkpoint = False
    nn.init.trunc_normal_(model.trunk.pos_embed, std=0.02)
    for block in model.trunk.blocks:
        for residual in (block.attn.proj, block.mlp.fc2):
            nn.init.trunc_normal_(residual.weight, std=0.02 / math.sqrt(2 * ARCHITECTURE.depth))
    _attend_by_position(model.mask_decoder.transformer)
    return model


@torch.no_grad()
def _attend_by_position(transformer: TwoWayTransformer) -> None:
    """Make the cross-attention look where a prompt points, from the first step on.

    Queries and keys carry the same Fourier encoding of position: C/2 sines, then their cosines.
    Each head passes some of those pairs on in both, so their product peaks at equal positions.
    """
    attentions: list[Attention] = [transformer.final_attn_token_to_image]
    for layer in transformer.layers:
        attentions += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    for attention in attentions:
        channels, inner = attention.embedding_dim, attention.internal_dim
        pairs = torch.randperm(channels // 2)[: inner // 2].view(attention.num_heads, -1)
        kept = torch.cat([pairs, pairs + channels // 2], 1).flatten()
        lookup = torch.zeros(inner, channels)
        lookup[torch.arange(inner), kept] = 1.5
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.mul_(0.2).add_(lookup)


@torch.no_grad()
def resized(model: InteractiveModel, image_size: int) -> InteractiveModel:
    """The same weights for a different input size; the position embedding is interpolated."""
    other = InteractiveModel(sized(image_size))
    other.trunk.use_act_checkpoint = False
    weights = {k: v for k, v in model.state_dict().items() if not k.endswith("freqs_cis")}
    table = weights.pop("trunk.pos_embed")
    other.load_state_dict(weights, strict=False)
    side = model.architecture.grid
    square = table[:, 1:].view(1, side, side, -1).permute(0, 3, 1, 2)
    grid = other.architecture.grid
    square = functional.interpolate(square, (grid, grid), mode="bicubic", align_corners=False)
    other.trunk.pos_embed.copy_(torch.cat([table[:, :1], square.flatten(2).transpose(1, 2)], 1))
    return other


@torch.no_grad()
def init_patch_embedding(model: InteractiveModel, images: NDArray[np.uint8]) -> None:
    """Initialise the patch embedding with the principal components of real patches.

    images: UINT8 [B, S, S, 3]. Random filters mostly see noise; these see what patches consist of.
    """
    patch = ARCHITECTURE.patch_size
    inputs = normalise(torch.from_numpy(np.array(images)))
    patches = functional.unfold(inputs, patch, stride=patch).transpose(1, 2).flatten(0, 1)
    spread, axes = torch.linalg.eigh(patches.T @ patches / len(patches))
    strongest = (
        axes[:, -ARCHITECTURE.embed_dim :] / (spread[-ARCHITECTURE.embed_dim :] + 0.02).sqrt()
    )
    weight = model.trunk.patch_embed.proj.weight
    weight.copy_(strongest.T.reshape(weight.shape))


def encode(model: InteractiveModel, images: Tensor) -> Features:
    """`model.encode` at a fraction of its cost: linear layers after the last GELU are fused.

    images: FP32 [B, 3, S, S], normalised. Used in training; equal to it up to rounding.
    """
    (tokens,) = model.trunk(images)
    fine, middle, coarse = model.neck
    return (
        _fused(coarse, tokens) + model.no_mem_embed.view(1, -1, 1, 1),
        _fused(fine, tokens, model.mask_decoder.conv_s0),
        _fused(middle, tokens, model.mask_decoder.conv_s1),
    )


def _fused(level: nn.Sequential, tokens: Tensor, last: nn.Conv2d | None = None) -> Tensor:
    """Run a neck level with conv_1x1, conv_3x3 and the decoder's 1x1 folded into one 3x3."""
    for name, module in level.named_children():
        if not name.startswith("conv_"):
            tokens = module(tokens)
    first, middle = level.conv_1x1, level.conv_3x3
    assert isinstance(first, nn.Conv2d) and isinstance(middle, nn.Conv2d)
    assert first.bias is not None and middle.bias is not None
    kernel: Tensor = middle.weight
    bias: Tensor = middle.bias
    if last is not None:
        kernel = torch.einsum("om,mkij->okij", last.weight[:, :, 0, 0], kernel)
        bias = functional.linear(bias, last.weight[:, :, 0, 0], last.bias)
    # The first bias becomes a channel of ones, so that zero padding excludes it at the border.
    entry = torch.cat([first.weight[:, :, 0, 0], first.bias[:, None]], 1)
    kernel = torch.einsum("okij,kc->ocij", kernel, entry)
    ones = torch.ones_like(tokens[:, :1])
    return functional.conv2d(torch.cat([tokens, ones], 1), kernel, bias, padding=1)


def decode(model: InteractiveModel, features: Features, owner: Tensor, prompts: Prompts) -> Answer:
    """Answer the prompts of N objects; owner: INT64 [N], the index of each object's picture."""
    sparse, dense = model.prompt_encoder(
        points=(prompts.coords, prompts.labels), boxes=None, masks=prompts.masks
    )
    image_embed, high_res_feats_0, high_res_feats_1 = (f.index_select(0, owner) for f in features)
    logits, ious, _, _ = model.mask_decoder.predict_masks(
        image_embeddings=image_embed,
        image_pe=model.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        repeat_image=False,
        high_res_features=[high_res_feats_0, high_res_feats_1],
    )
    return Answer(logits, ious)


def normalise(images: Tensor) -> Tensor:
    """UINT8 [B, S, S, 3] to FP32 [B, 3, S, S], normalised with mean and standard deviation 0.5."""
    return images.permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1
