"""The prompt decoder: SAM's prompt encoder and mask decoder as one `torch.export` program.

The program decodes N objects of T tokens each. It knows neither requests nor images: its caller
passes one embedding per object (an expanded view if objects share an image) and all tokens,
including the trailing not-a-point token of an object with points or a box.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from math import pi
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule

from export.architecture import Architecture, InteractiveModel
from export.mask_decoder import MergedMaskDecoder, as_rows

MAX_OBJECTS = 1024
MAX_TOKENS = 1024

NOT_A_POINT = -1
"""The lowest label; the others follow it."""

TORCH_VERSION = "torch_version"
"""Extra file inside decoder.pt2."""


class PromptDecoder(nn.Module):
    """Meta's prompt encoder, and the mask decoder with every candidate at once."""

    def __init__(self, model: InteractiveModel) -> None:
        super().__init__()
        self.image_size = model.architecture.image_size
        self.prompt_encoder = model.prompt_encoder
        self.mask_decoder = MergedMaskDecoder(
            model.mask_decoder, model.prompt_encoder.get_dense_pe().detach()
        )
        labels = (self.prompt_encoder.not_a_point_embed, *self.prompt_encoder.point_embeddings)
        self.labels = nn.Buffer(torch.cat([label.weight.detach() for label in labels]))
        self._with_fallback = model.mask_decoder._dynamic_multimask_via_stability
        self.eval().requires_grad_(False)

    def forward(
        self,
        image_embed: Tensor,
        high_res_feats_0: Tensor,
        high_res_feats_1: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        mask_index: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Decode N objects of T tokens, K of which refine an earlier mask.

        Args:
            image_embed: [N, 256, E, E]; high_res_feats_0: [N, 32, 4E, 4E];
            high_res_feats_1: [N, 64, 2E, 2E].
            point_coords: [N, T, 2], x and y as fractions of the image's width and height.
            point_labels: INT32 [N, T]; 1, 0, 2, 3 as in the wire contract, -1 not a point.
            mask_input: [K, 4E, 4E] logits; mask_index: INT64 [K], the objects they belong to.

        Returns:
            masks [N, 4, 4E, 4E], logits, not clamped, and iou_predictions [N, 4]: first the one
            answer of `multimask_output=False`, stability fallback included, then the three
            candidates of `multimask_output=True`.
        """
        sparse = self._points(point_coords, point_labels)
        pixels = self._pixels(image_embed, mask_input, mask_index)
        masks, ious = self.mask_decoder(pixels, sparse, high_res_feats_0, high_res_feats_1)
        mask, iou = self._with_fallback(masks, ious)
        return torch.cat((mask, masks[:, 1:]), dim=1), torch.cat((iou, ious[:, 1:]), dim=1)

    def _points(self, point_coords: Tensor, point_labels: Tensor) -> Tensor:
        """Meta's `_embed_points`, with a table of the labels' embeddings: [N, T, 256]."""
        # From pixel centres, like Meta's.
        positions = (point_coords * self.image_size + 0.5) / self.image_size
        not_points = (point_labels == NOT_A_POINT).unsqueeze(-1)
        return self._encode_positions(positions).masked_fill(not_points, 0) + F.embedding(
            point_labels - NOT_A_POINT, self.labels
        )

    def _encode_positions(self, positions: Tensor) -> Tensor:
        """Meta's `_pe_encoding`, [N, T, 2] → [N, T, 256], without its matrix product, which in TF32
        would round positions by up to a quarter of a pixel at 1008 pixels.
        """
        along_x, along_y = self.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
        x, y = (2 * positions - 1).chunk(2, dim=-1)
        angles = 2 * pi * (x * along_x + y * along_y)
        return torch.cat((angles.sin(), angles.cos()), dim=-1)

    def _pixels(self, image_embed: Tensor, mask_input: Tensor, mask_index: Tensor) -> Tensor:
        """The image's embedding plus the mask's, or plus that of no mask: [N, E·E, 256]."""
        no_mask = self.prompt_encoder.no_mask_embed.weight
        # Added first: nothing has to be moved if the embedding is channels last already.
        pixels: Tensor = (as_rows(image_embed) + no_mask).contiguous()
        masks = self.prompt_encoder.mask_downscaling(mask_input.unsqueeze(1))
        pixels.index_copy_(0, mask_index, as_rows(image_embed[mask_index] + masks))
        return pixels


def example_inputs(
    architecture: Architecture, objects: int = 2, tokens: int = 3, masks: int = 2
) -> dict[str, Tensor]:
    """Inputs of `PromptDecoder` by name; also used for tracing."""
    embedding, mask = architecture.grid, architecture.mask_size
    channels = architecture.d_model
    return {
        "image_embed": torch.randn(objects, channels, embedding, embedding),
        "high_res_feats_0": torch.randn(objects, channels // 8, mask, mask),
        "high_res_feats_1": torch.randn(objects, channels // 4, mask // 2, mask // 2),
        "point_coords": torch.rand(objects, tokens, 2),
        "point_labels": torch.ones(objects, tokens, dtype=torch.int32),
        "mask_input": torch.randn(masks, mask, mask),
        "mask_index": torch.arange(masks),
    }


def export_decoder(model: InteractiveModel) -> ExportedProgram:
    """Trace the decoder with any number of objects, tokens and masks."""
    objects, tokens = Dim("objects", max=MAX_OBJECTS), Dim("tokens", min=0, max=MAX_TOKENS)
    masks = Dim("masks", min=0, max=MAX_OBJECTS)
    inputs = example_inputs(model.architecture, objects=3, tokens=5, masks=2)
    return torch.export.export(
        PromptDecoder(model),
        args=(),
        kwargs=inputs,
        dynamic_shapes={
            "image_embed": {0: objects},
            "high_res_feats_0": {0: objects},
            "high_res_feats_1": {0: objects},
            "point_coords": {0: objects, 1: tokens},
            "point_labels": {0: objects, 1: tokens},
            "mask_input": {0: masks},
            "mask_index": {0: masks},
        },
    )


def save_decoder(program: ExportedProgram, path: Path) -> None:
    """Write the program and the torch version, which a reader's must not be older than."""
    program.example_inputs = None  # they are as large as the weights
    for graph in _graphs(program):
        for node in graph.nodes:
            node.meta.pop("stack_trace", None)  # contains local paths
    archive = BytesIO()
    torch.export.save(program, archive, extra_files={TORCH_VERSION: torch.__version__})
    # Not written by torch directly, which fails with an internal error when the disk is full.
    path.write_bytes(archive.getvalue())


def _graphs(program: ExportedProgram) -> Iterator[Graph]:
    """The program's own graph and those of its branches."""
    for module in program.graph_module.modules():
        if isinstance(module, GraphModule):
            yield module.graph
