"""Meta's mask decoder in fewer operations: the same function, rearranged for few tokens.

An object has some ten tokens and an image thousands of pixels, so the cost of a decode is the work
per pixel. Meta projects each pixel to queries, keys and values. Here the tokens are projected twice
instead, head by head:

    (W_q t) · (W_k x) = (W_kᵀ W_q t) · x        Σ p_x W_o W_v x = W_o W_v Σ p_x x

so pixels are only ever multiplied by heads × tokens vectors: the same results except for rounding,
and less work as long as tokens are few (`few_tokens`); otherwise Meta's method is used. Upscaling
is a matrix product too; pixels stay in the order in which a 2 × 2 transposed convolution produces
them until the masks are complete.
"""

from __future__ import annotations

from math import isqrt

import torch
import torch.nn.functional as F
from sam3.sam.common import LayerNorm2d
from sam3.sam.mask_decoder import MaskDecoder
from sam3.sam.transformer import Attention, TwoWayTransformer
from torch import Tensor, nn


def few_tokens(attention: Attention) -> int:
    """The largest number of tokens, the decoder's own included, for which merging is less work.

    Multiplications per pixel, for T tokens, H heads, C channels and D inner channels, are 2·T·H·C
    merged and 2·C·D + 2·T·D otherwise; the limit is where both are equal.
    """
    heads: int = attention.num_heads
    width: int = attention.embedding_dim
    inside: int = attention.internal_dim
    return width * inside // (heads * width - inside)


class _MergedAttention(nn.Module):
    """What both directions share: D inner channels, split into H heads of d channels each."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.inside = attention.internal_dim
        self.heads = (attention.num_heads, self.inside // attention.num_heads)
        self.scale = self.heads[1] ** -0.5

    def _split(self, weight: Tensor) -> Tensor:
        """[D, …] → [H, d, …]"""
        return weight.detach().view(*self.heads, *weight.shape[1:])

    def _widen(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """tokens [N, T, D], each head times its weight [d, C] out of [H, d, C] → [N, H · T, C]"""
        n, t, _ = tokens.shape
        wide = torch.bmm(tokens.view(n * t, *self.heads).transpose(0, 1), weight)
        return wide.view(-1, n, t, weight.shape[-1]).transpose(0, 1).flatten(1, 2)

    def _narrow(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """The reverse: tokens [N, H · T, C], weight [H, C, d] → [N, T, D]"""
        n, _, c = tokens.shape
        heads = tokens.view(n, self.heads[0], -1, c).transpose(0, 1).flatten(1, 2)
        return torch.bmm(heads, weight).transpose(0, 1).reshape(n, -1, self.inside)


class TokenToImageAttention(_MergedAttention):
    """Tokens attend to pixels.

    The keys' bias adds the same to the scores of all pixels, which softmax cancels.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__(attention)
        self.query, self.out = attention.q_proj, attention.out_proj
        self.key = nn.Buffer(self._split(attention.k_proj.weight) * self.scale)
        self.value = nn.Buffer(self._split(attention.v_proj.weight).transpose(1, 2).contiguous())
        self.value_bias = attention.v_proj.bias

    def forward(self, tokens: Tensor, keys: Tensor, pixels: Tensor) -> Tensor:
        """tokens [N, T, C], keys and pixels [N, P, C] → [N, T, C]"""
        query = self._widen(self.query(tokens), self.key)
        weights = torch.bmm(query, keys.transpose(1, 2)).softmax(dim=-1)
        # A head's weights sum to 1: the values' bias passes through unchanged.
        attended = self._narrow(torch.bmm(weights, pixels), self.value) + self.value_bias
        answer: Tensor = self.out(attended)
        return answer


class ImageToTokenAttention(_MergedAttention):
    """Pixels attend to tokens; the answer is added to the pixels."""

    def __init__(self, attention: Attention) -> None:
        super().__init__(attention)
        self.key, self.value = attention.k_proj, attention.v_proj
        self.query = nn.Buffer(self._split(attention.q_proj.weight) * self.scale)
        # The queries' bias adds one number per head to the scores of a token, given by its key.
        bias = self._split(attention.q_proj.bias) * self.scale
        self.query_bias = nn.Buffer(bias.unsqueeze(2))
        self.out = nn.Buffer(self._split(attention.out_proj.weight.T.contiguous()))
        # A head's weights sum to 1: split among the heads, the output's bias is added exactly once.
        self.out_bias = nn.Buffer(attention.out_proj.bias.detach() / self.heads[0])

    def forward(self, keys: Tensor, tokens: Tensor, values: Tensor, pixels: Tensor) -> Tensor:
        """keys (attending pixels) and pixels [N, P, C], tokens and values [N, T, C] → [N, P, C]"""
        key = self.key(tokens)
        scores = torch.baddbmm(
            self._widen(key, self.query_bias), self._widen(key, self.query), keys.transpose(1, 2)
        )
        # Tokens before pixels: softmax over an axis of ten is slow if that axis is the last.
        by_head = scores.view(len(scores), self.heads[0], -1, keys.shape[1])
        weights = by_head.softmax(dim=2).flatten(1, 2)
        value = self._widen(self.value(values), self.out) + self.out_bias
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


class OriginalTwoWay(nn.Module):
    """Meta's unmodified `TwoWayTransformer`."""

    def __init__(self, transformer: TwoWayTransformer) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, pixels: Tensor, positions: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Like `MergedTwoWay`."""
        image, image_pe = (_as_square(rows) for rows in (pixels, positions))
        found: tuple[Tensor, Tensor] = self.transformer(image, image_pe, tokens)
        return found


class AdaptiveTwoWay(nn.Module):
    """Merged up to `few` tokens, Meta's original beyond: chosen at each decode by its tokens."""

    def __init__(self, transformer: TwoWayTransformer, few: int) -> None:
        super().__init__()
        self.few = few
        self.merged = MergedTwoWay(transformer)
        self.original = OriginalTwoWay(transformer)

    def forward(self, pixels: Tensor, positions: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Like `MergedTwoWay`."""
        operands = (pixels, positions, tokens)
        chosen: tuple[Tensor, Tensor] = torch.cond(
            tokens.shape[1] <= self.few, self.merged, self.original, operands
        )
        return chosen


class Upscaling(nn.Module):
    """Meta's `output_upscaling`, and the masks from it."""

    def __init__(self, upscaling: nn.Sequential, side: int) -> None:
        """side: E"""
        super().__init__()
        first, norm, _, second, _ = upscaling
        assert isinstance(first, nn.ConvTranspose2d)
        assert isinstance(second, nn.ConvTranspose2d)
        assert isinstance(norm, LayerNorm2d)
        self.first, self.second = _as_linear(first), _as_linear(second)
        self.norm = nn.LayerNorm(first.out_channels, eps=norm.eps)
        self.norm.load_state_dict(norm.state_dict())
        made = torch.arange(16 * side**2).view(side, side, 2, 2, 2, 2)
        self.order = nn.Buffer(made.permute(0, 2, 4, 1, 3, 5).flatten())

    def forward(self, pixels: Tensor, fine: Tensor, middle: Tensor, hyper: Tensor) -> Tensor:
        """Masks [N, K, 4E, 4E].

        pixels [N, E·E, C]; fine, high_res_feats_0 [N, C/8, 4E, 4E]; middle, high_res_feats_1
        [N, C/4, 2E, 2E]; hyper [N, K, C/8]. In the views below the first y, x axes are those of
        E × E, and each further pair is the 2 × 2 that a step makes from a pixel.
        """
        n, c_fine, c_middle = fine.shape[0], fine.shape[1], middle.shape[1]
        e = middle.shape[-1] // 2
        middle = middle.view(n, c_middle, e, 2, e, 2).permute(0, 2, 4, 3, 5, 1)
        upscaled = self.first(pixels).view(n, e, e, 2, 2, c_middle).add_(middle)
        fine = fine.view(n, c_fine, e, 2, 2, e, 2, 2).permute(0, 2, 5, 3, 6, 4, 7, 1)
        upscaled = self.second(F.gelu(self.norm(upscaled)))
        upscaled = upscaled.view(n, e, e, 2, 2, 2, 2, c_fine).add_(fine)
        masks = torch.bmm(hyper, F.gelu(upscaled).view(n, -1, c_fine).transpose(1, 2))
        # Gathered, because copying two neighbours at a time is slow.
        in_rows = masks.gather(2, self.order.expand_as(masks))
        return in_rows.view(n, -1, 4 * e, 4 * e)


class _BatchedLinear(nn.Module):
    """K linear layers, one for each of K tokens."""

    def __init__(self, layers: tuple[nn.Linear, ...]) -> None:
        super().__init__()
        self.weight = nn.Buffer(torch.stack([layer.weight.detach().T for layer in layers]))
        self.bias = nn.Buffer(torch.stack([layer.bias.detach().unsqueeze(0) for layer in layers]))

    def forward(self, tokens: Tensor) -> Tensor:
        """[K, N, C] → [K, N, C']"""
        return torch.baddbmm(self.bias, tokens, self.weight)


class Hypernetworks(nn.Module):
    """Meta's `output_hypernetworks_mlps`, one for each of K masks."""

    def __init__(self, networks: nn.ModuleList) -> None:
        super().__init__()
        layers = zip(*(network.layers for network in networks), strict=True)
        self.layers = nn.ModuleList(map(_BatchedLinear, layers))

    def forward(self, tokens: Tensor) -> Tensor:
        """[N, K, C] → [N, K, C/8]"""
        made = tokens.transpose(0, 1)
        *hidden, last = self.layers
        for layer in hidden:
            made = layer(made).relu()
        answer: Tensor = last(made).transpose(0, 1)
        return answer


class MergedMaskDecoder(nn.Module):
    """Meta's `MaskDecoder.predict_masks` with the same weights."""

    def __init__(self, decoder: MaskDecoder, image_pe: Tensor) -> None:
        """image_pe: the prompt encoder's dense encoding, [1, C, E, E]."""
        super().__init__()
        first = (decoder.obj_score_token, decoder.iou_token, decoder.mask_tokens)
        self.tokens = nn.Buffer(torch.cat([t.weight for t in first]).detach().unsqueeze(0))
        self.positions = nn.Buffer(as_rows(image_pe).contiguous())
        few = few_tokens(decoder.transformer.final_attn_token_to_image)
        self.two_way = AdaptiveTwoWay(decoder.transformer, few)
        self.upscaling = Upscaling(decoder.output_upscaling, image_pe.shape[-1])
        self.hypernetworks = Hypernetworks(decoder.output_hypernetworks_mlps)
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
        mask_tokens = tokens[:, 2 : self.tokens.shape[1]]
        masks = self.upscaling(pixels, fine, middle, self.hypernetworks(mask_tokens))
        return masks, self.iou_head(tokens[:, 1])


def as_rows(image: Tensor) -> Tensor:
    """[N, C, E, E] → [N, E·E, C]"""
    return image.flatten(2).transpose(1, 2)


def _as_square(rows: Tensor) -> Tensor:
    """[N, E·E, C] → [N, C, E, E]"""
    n, pixels, channels = rows.shape
    side = isqrt(pixels)
    return rows.transpose(1, 2).view(n, channels, side, side)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.load_state_dict({"weight": weight, "bias": bias})
    return linear


def _as_linear(convolution: nn.ConvTranspose2d) -> nn.Linear:
    """A transposed convolution without overlap: C → (2 · 2 · C') for each pixel."""
    weight, bias = convolution.weight.detach(), convolution.bias
    assert bias is not None and convolution.stride == convolution.kernel_size
    squares = weight.shape[2] * weight.shape[3]
    return _linear(weight.permute(2, 3, 1, 0).flatten(0, 2), bias.detach().repeat(squares))
