"""The image encoder: SAM 3's trunk and interactive neck as one graph, from pixels to embeddings.

    image u8 [B,S,S,3] ─► patches ─► 32 blocks on tokens kept in window order ─► three neck levels
                                                                                  │    │     │
                                            image_embed [B,256,E,E] ◄─────────────┘    │     │
                                            high_res_feats_1 [B,64,2E,2E] ◄────────────┘     │
                                            high_res_feats_0 [B,32,4E,4E] ◄──────────────────┘

The blocks are Meta's. Only the way in which the same numbers are computed differs from
`InteractiveModel.encode`: tokens are put in window order once instead of twice per block (attention
does not depend on the order as long as the rotary table has the same), rotation and attention are
fused operators, and consecutive convolutions without a nonlinearity between them are merged.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from sam3.model.vitdet import Attention, Block, get_abs_pos
from torch import Tensor, nn

from export.architecture import Architecture, InteractiveModel
from export.half_precision import STREAM_SCALE, HalfPrecisionBlocks
from export.operators import attention, rotary_embedding

FEATURES = ("image_embed", "high_res_feats_0", "high_res_feats_1")
"""Names of the graph's outputs, in order."""

OPSET = 20
MAX_BATCH = 8


class ImageEncoder(nn.Module):
    """UINT8 RGB [B, S, S, 3] → image_embed, high_res_feats_0, high_res_feats_1.

    With `dtype` FP16, matrix products, attention and convolutions are in half precision and the
    outputs are FP16; the patch projection and the sums inside layer norms stay FP32. The residual
    stream exceeds half precision's range: if operators are fused and windows fit the grid, it is
    kept scaled in FP16 (see half_precision.py), otherwise in FP32 and cast to FP16 at its end. The
    softmax inside attention is FP32 with fused operators and FP16 with plain ones.

    `fused`: rotation and attention as ONNX Runtime's own operators, or in plain ones (see
    operators.py).
    """

    def __init__(
        self,
        model: InteractiveModel,
        dtype: torch.dtype = torch.float32,
        *,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.windows = _Windows(model.architecture)
        self.dtype = dtype
        self.patch_embed = _PatchEmbed(model.trunk.patch_embed.proj, self.windows)
        self.position = nn.Buffer(self.windows.join(self.windows.split(_position_embedding(model))))
        self.ln_pre = deepcopy(model.trunk.ln_pre)
        self.blocks = (
            _half_blocks(model, self.windows)
            if dtype == torch.float16 and keeps_fp16_stream(model.architecture, fused)
            else _Blocks(model, self.windows, dtype, fused)
        )
        neck = _folded_neck(model, 1 if dtype == torch.float32 else STREAM_SCALE)
        self.fine, self.middle, self.coarse = (level.to(dtype) for level in neck)
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens = self.blocks(self.ln_pre(self.patch_embed(image) + self.position))
        grid = self.windows.merge(self.windows.part(tokens)).to(self.dtype)
        return self.coarse(grid), self.fine(grid), self.middle(grid)


def keeps_fp16_stream(architecture: Architecture, fused: bool) -> bool:
    """Whether an FP16 graph keeps the residual stream, and what is added to it, scaled in FP16."""
    return fused and _Windows(architecture).fits


class _Windows:
    """Token layouts of a grid of E×E patches cut into n×n windows of side w.

    If w does not divide E, the grid is one window and the blocks cut and pad it themselves.
    """

    def __init__(self, architecture: Architecture) -> None:
        grid, side = architecture.grid, architecture.window_size
        self.fits = grid % side == 0
        self.side = side if self.fits else grid
        self.count = grid // self.side

    def split(self, grid: Tensor) -> Tensor:
        """[B, E, E, C] → [B·n², w, w, C]."""
        n, w = self.count, self.side
        cut = grid.reshape(-1, n, w, n, w, grid.shape[-1])
        return cut.permute(0, 1, 3, 2, 4, 5).reshape(-1, w, w, grid.shape[-1])

    def reorder(self, rows: Tensor) -> Tensor:
        """[E·E, …] in the grid's order → in window order."""
        side = self.count * self.side
        return self.split(rows.reshape(1, side, side, -1)).flatten(0, 2)

    def merge(self, windows: Tensor) -> Tensor:
        """[B·n², w, w, C] → [B, C, E, E]."""
        n, w, channels = self.count, self.side, windows.shape[-1]
        tiles = windows.reshape(-1, n, n, w, w, channels).permute(0, 5, 1, 3, 2, 4)
        return tiles.reshape(-1, channels, n * w, n * w)

    def join(self, tokens: Tensor) -> Tensor:
        """All windows of an image as one: [B, n²·w, w, C]."""
        return tokens.reshape(-1, self.count**2 * self.side, self.side, tokens.shape[-1])

    def part(self, tokens: Tensor) -> Tensor:
        """The inverse of `join`: [B·n², w, w, C]."""
        return tokens.reshape(-1, self.side, self.side, tokens.shape[-1])


class _PatchEmbed(nn.Module):
    """Normalise and project patches, in window order: UINT8 [B, S, S, 3] → [B, n²·w, w, C].

    (x/255 - mean)/std with mean = std = 1/2 is (x - 127.5)/127.5. The division is split into a
    division by 128, which is exact in half precision, and a factor folded into the weights.
    """

    def __init__(self, projection: nn.Conv2d, windows: _Windows) -> None:
        super().__init__()
        self.windows = windows
        self.patch = projection.kernel_size[0]
        weight = projection.weight.permute(0, 2, 3, 1).flatten(1)
        self.weight = nn.Parameter(weight * (128 / 127.5))

    def forward(self, image: Tensor) -> Tensor:
        n, w, p = self.windows.count, self.windows.side, self.patch
        pixels = image.to(
            self.weight.dtype
        )  # first: TensorRT accepts UINT8 only as input to a Cast
        cut = pixels.reshape(-1, n, w, p, n, w, p, 3).permute(0, 1, 4, 2, 5, 3, 6, 7)
        patches = cut.reshape(-1, n * n * w, w, p * p * 3)
        return nn.functional.linear((patches - 127.5) / 128, self.weight)


class _Narrow(nn.Module):
    """A layer norm in FP32 whose result is cast for half-precision products."""

    def __init__(self, norm: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = norm
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        narrow: Tensor = self.norm(x).to(self.dtype)
        return narrow


def _alias(module: nn.Module) -> Any:
    """A copy that can be modified; its weights share the original's memory until converted."""
    parameters = {id(p): nn.Parameter(p.data, requires_grad=False) for p in module.parameters()}
    return deepcopy(module, parameters)


class _Attention(nn.Module):
    """Meta's ViT attention with this package's operators; tokens [B, H, W, C] in any order."""

    def __init__(self, meta: Attention, rotary: Tensor, dtype: torch.dtype, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.num_heads: int = meta.num_heads
        self.qkv = _alias(meta.qkv).to(dtype)
        self.proj = _alias(meta.proj).to(dtype)
        self.cos = nn.Buffer(rotary.real.to(dtype).contiguous())
        self.sin = nn.Buffer(rotary.imag.to(dtype).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x.flatten(1, 2)).chunk(3, dim=-1)
        query = rotary_embedding(query, self.cos, self.sin, self.num_heads, fused=self.fused)
        key = rotary_embedding(key, self.cos, self.sin, self.num_heads, fused=self.fused)
        attended = attention(query, key, value.contiguous(), self.num_heads, fused=self.fused)
        shaped: Tensor = self.proj(attended).reshape(x.shape)
        return shaped


class _Blocks(nn.Module):
    """Meta's blocks in sequence, on an FP32 stream.

    For an FP16 neck the stream is divided by `STREAM_SCALE` at the end. What each block adds is not
    scaled: scaled weights round more in FP16, which cost a mask of the demo model 0.006 IoU.
    """

    def __init__(
        self, model: InteractiveModel, windows: _Windows, dtype: torch.dtype, fused: bool
    ) -> None:
        super().__init__()
        self.windows = windows
        self.scaled = dtype != torch.float32
        self.global_att_blocks = frozenset(model.architecture.global_att_blocks)
        self.blocks = nn.ModuleList(
            _block(block, i in self.global_att_blocks, windows, dtype, fused)
            for i, block in enumerate(model.trunk.blocks)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            is_global = i in self.global_att_blocks
            tokens = block(self.windows.join(tokens) if is_global else self.windows.part(tokens))
        return tokens / STREAM_SCALE if self.scaled else tokens


def _half_blocks(model: InteractiveModel, windows: _Windows) -> HalfPrecisionBlocks:
    blocks, global_att_blocks = model.trunk.blocks, frozenset(model.architecture.global_att_blocks)
    rotary = {i in global_att_blocks: block.attn.freqs_cis for i, block in enumerate(blocks)}
    return HalfPrecisionBlocks(
        blocks,
        global_att_blocks,
        rotary.get(False, rotary[True]),  # the other, unused, if every block is global
        windows.reorder(rotary[True]),
    )


def _block(
    block: Block, is_global: bool, windows: _Windows, dtype: torch.dtype, fused: bool
) -> nn.Module:
    rotary = block.attn.freqs_cis
    if is_global:
        rotary = windows.reorder(rotary)
    ours = _alias(block)
    if windows.fits:
        ours.window_size = 0  # the tokens arrive cut into windows
    ours.attn = _Attention(block.attn, rotary, dtype, fused)
    if dtype != torch.float32:
        ours.norm1, ours.norm2 = _Narrow(ours.norm1, dtype), _Narrow(ours.norm2, dtype)
        ours.mlp.to(dtype)
    return cast(nn.Module, ours)


def _position_embedding(model: InteractiveModel) -> Tensor:
    grid = model.architecture.grid
    trunk = model.trunk
    embedding: Tensor = get_abs_pos(
        trunk.pos_embed, trunk.pretrain_use_cls_token, (grid, grid), tiling=trunk.tile_abs_pos
    )
    return embedding.detach()


def _folded_neck(model: InteractiveModel, scale: float) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The three neck levels merged with the decoder's entry convolutions.

    scale: the factor by which the input was divided; each level's first layer undoes it.
    """
    fine, middle, coarse = _alias(model.neck)
    if scale != 1:
        for first in (fine.dconv_2x2_0, middle.dconv_2x2, coarse.conv_1x1):
            first.weight = nn.Parameter(first.weight * scale)
    decoder = model.mask_decoder
    last = coarse.conv_3x3
    last.bias = nn.Parameter(last.bias + model.no_mem_embed.flatten())
    return (
        nn.Sequential(
            fine.dconv_2x2_0,
            fine.gelu,
            _then_pointwise(fine.dconv_2x2_1, fine.conv_1x1),
            _then_pointwise(fine.conv_3x3, decoder.conv_s0),
        ),
        nn.Sequential(
            _then_pointwise(middle.dconv_2x2, middle.conv_1x1),
            _then_pointwise(middle.conv_3x3, decoder.conv_s1),
        ),
        nn.Sequential(coarse.conv_1x1, last),
    )


def _then_pointwise(
    first: nn.Conv2d | nn.ConvTranspose2d, pointwise: nn.Conv2d
) -> nn.Conv2d | nn.ConvTranspose2d:
    """One layer for `pointwise(first(x))`: a 1×1 convolution only mixes the outputs of `first`."""
    mix, offset = pointwise.weight.double().flatten(1), pointwise.bias
    assert first.bias is not None
    assert offset is not None
    transposed = isinstance(first, nn.ConvTranspose2d)
    spelling = "iohw,po->iphw" if transposed else "oihw,po->pihw"
    folded = deepcopy(first)
    folded.out_channels = pointwise.out_channels
    folded.weight = nn.Parameter(torch.einsum(spelling, first.weight.double(), mix).float())
    folded.bias = nn.Parameter((mix @ first.bias.double() + offset.double()).float())
    return folded


def export_encoder(encoder: ImageEncoder, image_size: int, path: Path) -> None:
    """Write `encoder` as ONNX with a dynamic batch; weights go to external data beside it."""
    image = torch.zeros(2, image_size, image_size, 3, dtype=torch.uint8)
    program = torch.onnx.export(
        encoder,
        (image,),
        dynamo=True,
        opset_version=OPSET,
        input_names=["image"],
        output_names=list(FEATURES),
        dynamic_shapes={"image": {0: torch.export.Dim("batch", min=1, max=MAX_BATCH)}},
        verbose=False,
    )
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.clear()  # the exporter's stack traces contain local paths
    program.save(path, external_data=True)
