"""Meta's mask decoder in fewer operations: the same function, rearranged for few tokens.

An object has some ten tokens and an image thousands of pixels, so what a decode costs is what it
does to every pixel. Meta projects each pixel to queries, keys and values. Here these projections
are merged with the tokens' own, head by head:

    (W_q t) · (W_k x) = (W_kᵀ W_q t) · x        Σ p_x W_o W_v x = W_o W_v Σ p_x x

so that pixels are only ever multiplied with heads × tokens vectors: the same results but for
rounding, and less work while tokens are few and pixels many (`few_tokens`); else Meta's way is
taken. Upscaling is a matrix product too, its pixels in the order in which a 2 × 2 transposed
convolution makes them until the masks are there.
"""

from __future__ import annotations

from math import isqrt

import torch
import torch.nn.functional as F
from sam3.sam.common import LayerNorm2d
from sam3.sam.mask_decoder import MaskDecoder
from sam3.sam.transformer import Attention, TwoWayTransformer
from torch import Tensor, nn

CLICK_TOKENS = 2
"""A point, and the not-a-point token that SAM adds."""


def few_tokens(pixels: int, attention: Attention) -> int:
    """Up to how many tokens, the decoder's own included, merged projections are the faster way.

    Multiplications by P pixels, T tokens, H heads, C channels and D inside of the attention, which
    are 2·T·H·C·(C + P) merged and 2·P·C·D + 2·T·D·(C + P) otherwise, equated; less a tenth for
    the larger weights that have to be read, as measured on a CPU.
    """
    heads, width, inside = attention.num_heads, attention.embedding_dim, attention.internal_dim
    a_token = (heads * width - inside) * (width + pixels)
    return int(0.9 * pixels * width * inside / a_token)


class _Heads:
    """An attention's weights by head, in FP64 so that merging them rounds once.

    d_model C, H heads of D channels: q, k, v [H, D, C], their biases [H, D], out [C, H, D].
    """

    def __init__(self, attention: Attention) -> None:
        self.count = attention.num_heads
        self.width = attention.embedding_dim
        split = (self.count, attention.internal_dim // self.count)
        self.scale = split[1] ** -0.5
        self.q, self.k, self.v = (
            _exact(p.weight).view(*split, -1)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        self.q_bias, self.v_bias = (
            _exact(p.bias).view(split) for p in (attention.q_proj, attention.v_proj)
        )
        self.out = _exact(attention.out_proj.weight).view(-1, *split)
        self.out_bias = _exact(attention.out_proj.bias)


class TokenToImageAttention(nn.Module):
    """Tokens attend to pixels.

    What the keys' bias adds to a score is the same for all pixels, which softmax does not see.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        heads = _Heads(attention)
        self.heads = heads.count
        query = torch.einsum("hdi,hdo->hoi", heads.q, heads.k) * heads.scale
        bias = torch.einsum("hd,hdo->ho", heads.q_bias, heads.k) * heads.scale
        self.query = _linear(query.flatten(0, 1), bias.flatten())
        out = torch.einsum("hdi,ohd->ohi", heads.v, heads.out)
        # Weights of a head sum to 1: the values' bias passes through whole.
        out_bias = heads.out_bias + torch.einsum("hd,ohd->o", heads.v_bias, heads.out)
        self.out = _linear(out.flatten(1), out_bias)

    def forward(self, tokens: Tensor, keys: Tensor, pixels: Tensor) -> Tensor:
        """tokens [N, T, C], keys and pixels [N, P, C] → [N, T, C]"""
        n, t, c = tokens.shape
        query = self.query(tokens).view(n, t * self.heads, c)
        weights = torch.bmm(query, keys.transpose(1, 2)).softmax(dim=-1)
        merged: Tensor = self.out(torch.bmm(weights, pixels).view(n, t, self.heads * c))
        return merged


class ImageToTokenAttention(nn.Module):
    """Pixels attend to tokens; the answer is added to the pixels."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        heads = _Heads(attention)
        self.heads = heads.count
        k_bias = _exact(attention.k_proj.bias).view_as(heads.q_bias)
        # One more row for each head: what the queries' bias adds to the scores of a token.
        key = torch.einsum("hdi,hdo->hoi", heads.k, heads.q) * heads.scale
        self.key = _linear(
            key.flatten(0, 1), torch.einsum("hd,hdo->ho", k_bias, heads.q).flatten() * heads.scale
        )
        self.score_bias = _linear(
            torch.einsum("hdi,hd->hi", heads.k, heads.q_bias) * heads.scale,
            (k_bias * heads.q_bias).sum(dim=1) * heads.scale,
        )
        value = torch.einsum("hdi,ohd->hoi", heads.v, heads.out)
        # Weights of a head sum to 1: shared out to the heads, the answer's bias is added once.
        value_bias = torch.einsum("hd,ohd->ho", heads.v_bias, heads.out)
        self.value = _linear(
            value.flatten(0, 1), (value_bias + heads.out_bias / heads.count).flatten()
        )

    def forward(self, keys: Tensor, tokens: Tensor, values: Tensor, pixels: Tensor) -> Tensor:
        """keys (pixels that ask) and pixels [N, P, C], tokens and values [N, T, C] → [N, P, C]"""
        n, t, c = tokens.shape
        key = self.key(tokens).view(n, t * self.heads, c)
        bias = self.score_bias(tokens).view(n, t * self.heads, 1)
        # Tokens before pixels: softmax over an axis of ten is slow where that axis is the last.
        scores = torch.baddbmm(bias, key, keys.transpose(1, 2))
        weights = scores.view(n, t, -1).softmax(dim=1).view(n, t * self.heads, -1)
        value = self.value(values).view(n, t * self.heads, c)
        return torch.baddbmm(pixels, weights.transpose(1, 2), value)


class MergedTwoWay(nn.Module):
    """Meta's `TwoWayTransformer` with merged attention between tokens and pixels."""

    def __init__(self, transformer: TwoWayTransformer) -> None:
        super().__init__()
        self.layers = transformer.layers
        self.to_image = nn.ModuleList(
            TokenToImageAttention(layer.cross_attn_token_to_image) for layer in self.layers
        )
        self.to_tokens = nn.ModuleList(
            ImageToTokenAttention(layer.cross_attn_image_to_token) for layer in self.layers
        )
        self.last_to_image = TokenToImageAttention(transformer.final_attn_token_to_image)
        self.last_norm = transformer.norm_final_attn

    def forward(self, pixels: Tensor, positions: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [N, P, C], their positions [1, P, C], tokens [N, T, C] → tokens, pixels"""
        queries = tokens
        for i, layer in enumerate(self.layers):
            if layer.skip_first_layer_pe:
                queries = layer.self_attn(queries, queries, queries)
            else:
                placed = queries + tokens
                queries = queries + layer.self_attn(placed, placed, queries)
            queries = layer.norm1(queries)
            keys = pixels + positions
            queries = layer.norm2(queries + self.to_image[i](queries + tokens, keys, pixels))
            queries = layer.norm3(queries + layer.mlp(queries))
            pixels = layer.norm4(self.to_tokens[i](keys, queries + tokens, queries, pixels))
        answer = self.last_to_image(queries + tokens, pixels + positions, pixels)
        return self.last_norm(queries + answer), pixels


class MetasTwoWay(nn.Module):
    """Meta's `TwoWayTransformer` as it is."""

    def __init__(self, transformer: TwoWayTransformer) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, pixels: Tensor, positions: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """As `MergedTwoWay`."""
        image, image_pe = (_as_square(rows) for rows in (pixels, positions))
        found: tuple[Tensor, Tensor] = self.transformer(image, image_pe, tokens)
        return found


class EitherTwoWay(nn.Module):
    """Merged up to `few` tokens, Meta's beyond: decided at each decode, by the tokens it brings."""

    def __init__(self, transformer: TwoWayTransformer, few: int) -> None:
        super().__init__()
        self.few = few
        self.merged = MergedTwoWay(transformer)
        self.metas = MetasTwoWay(transformer)

    def forward(self, pixels: Tensor, positions: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """As `MergedTwoWay`."""
        given = (pixels, positions, tokens)
        chosen: tuple[Tensor, Tensor] = torch.cond(
            tokens.shape[1] <= self.few, self.merged, self.metas, given
        )
        return chosen


class Upscaling(nn.Module):
    """Meta's `output_upscaling`, and the masks of it."""

    def __init__(self, upscaling: nn.Sequential) -> None:
        super().__init__()
        first, norm, _, second, _ = upscaling
        assert isinstance(first, nn.ConvTranspose2d)
        assert isinstance(second, nn.ConvTranspose2d)
        assert isinstance(norm, LayerNorm2d)
        self.first, self.second = _as_linear(first), _as_linear(second)
        self.norm = nn.LayerNorm(first.out_channels, eps=norm.eps)
        self.norm.load_state_dict(norm.state_dict())

    def forward(self, pixels: Tensor, fine: Tensor, middle: Tensor, hyper: Tensor) -> Tensor:
        """Masks [N, K, 4E, 4E].

        pixels [N, E·E, C]; fine, high_res_feats_0 [N, C/8, 4E, 4E]; middle, high_res_feats_1
        [N, C/4, 2E, 2E]; hyper [N, K, C/8]. y, x below are of E × E, each further pair of axes of
        the 2 × 2 that a step makes of a pixel.
        """
        n, c_fine, c_middle = fine.shape[0], fine.shape[1], middle.shape[1]
        e = middle.shape[-1] // 2
        middle = middle.view(n, c_middle, e, 2, e, 2).permute(0, 2, 4, 3, 5, 1)
        upscaled = F.gelu(self.norm(self.first(pixels).view(n, e, e, 2, 2, c_middle) + middle))
        fine = fine.view(n, c_fine, e, 2, 2, e, 2, 2).permute(0, 2, 5, 3, 6, 4, 7, 1)
        upscaled = F.gelu(self.second(upscaled).view(n, e, e, 2, 2, 2, 2, c_fine) + fine)
        masks = torch.bmm(hyper, upscaled.view(n, -1, c_fine).transpose(1, 2))
        in_rows = masks.view(n, -1, e, e, 2, 2, 2, 2).permute(0, 1, 2, 4, 6, 3, 5, 7)
        return in_rows.reshape(n, -1, 4 * e, 4 * e)


class MergedMaskDecoder(nn.Module):
    """Meta's `MaskDecoder.predict_masks`, given the same weights."""

    def __init__(self, decoder: MaskDecoder, image_pe: Tensor) -> None:
        """image_pe: [1, C, E, E], the prompt encoder's dense one."""
        super().__init__()
        first = (decoder.obj_score_token, decoder.iou_token, decoder.mask_tokens)
        self.tokens = nn.Buffer(torch.cat([t.weight for t in first]).detach().unsqueeze(0))
        self.positions = nn.Buffer(as_rows(image_pe).contiguous())
        few = few_tokens(image_pe[0, 0].numel(), decoder.transformer.final_attn_token_to_image)
        pays = few >= self.tokens.shape[1] + CLICK_TOKENS
        metas = decoder.transformer
        self.two_way = EitherTwoWay(metas, few) if pays else MetasTwoWay(metas)
        self.upscaling = Upscaling(decoder.output_upscaling)
        self.hypernetworks = decoder.output_hypernetworks_mlps
        self.iou_head = decoder.iou_prediction_head

    def forward(
        self, pixels: Tensor, prompt: Tensor, fine: Tensor, middle: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Every mask and its predicted IoU.

        pixels: [N, E·E, C], the image's embedding with the mask's added; prompt: [N, T, C];
        fine, middle: high_res_feats_0 and _1. Returns [N, 4, 4E, 4E] and [N, 4].
        """
        tokens = torch.cat((self.tokens.expand(pixels.shape[0], -1, -1), prompt), dim=1)
        tokens, pixels = self.two_way(pixels, self.positions, tokens)
        _, iou_token, *mask_tokens = tokens[:, : self.tokens.shape[1]].unbind(dim=1)
        hyper = [
            network(token) for network, token in zip(self.hypernetworks, mask_tokens, strict=True)
        ]
        return self.upscaling(pixels, fine, middle, torch.stack(hyper, 1)), self.iou_head(iou_token)


def as_rows(image: Tensor) -> Tensor:
    """[N, C, E, E] → [N, E·E, C]"""
    return image.flatten(2).transpose(1, 2)


def _as_square(rows: Tensor) -> Tensor:
    """[N, E·E, C] → [N, C, E, E]"""
    n, pixels, channels = rows.shape
    side = isqrt(pixels)
    return rows.transpose(1, 2).view(n, channels, side, side)


def _exact(weight: Tensor) -> Tensor:
    return weight.detach().double()


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.load_state_dict({"weight": weight, "bias": bias})
    return linear


def _as_linear(convolution: nn.ConvTranspose2d) -> nn.Linear:
    """A transposed convolution whose steps do not overlap: C → (2 · 2 · C') for each pixel."""
    weight, bias = convolution.weight.detach(), convolution.bias
    assert bias is not None and convolution.stride == convolution.kernel_size
    squares = weight.shape[2] * weight.shape[3]
    return _linear(weight.permute(2, 3, 1, 0).flatten(0, 2), bias.detach().repeat(squares))
