"""Meta's own predictor: complete and unchanged for parity tests, without a slow loop to be timed.

`SAM3InteractiveImagePredictor` on Meta's tracker and backbone classes, on any device and at any
size: nothing from `export` but the sizes takes part in the computation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import skimage.measure
import torch
from sam3.model.model_misc import TransformerWrapper
from sam3.model.necks import Sam3DualViTDetNeck
from sam3.model.position_encoding import PositionEmbeddingSine
from sam3.model.sam1_task_predictor import SAM3InteractiveImagePredictor
from sam3.model.sam3_tracker_base import Sam3TrackerBase
from sam3.model.vitdet import ViT
from sam3.model.vl_combiner import SAM3VLBackbone
from sam3.perflib import connected_components
from torch import Tensor, nn

from export import checkpoint
from export.architecture import Architecture, build_mask_decoder, build_trunk

HOLE_SIDE_FRACTION = 18
"""Meta fills holes of up to 256 = (288/18)² mask pixels; other sizes use the same share."""


def meta_predictor(
    checkpoint_file: Path, device: torch.device | str = "cpu"
) -> SAM3InteractiveImagePredictor:
    """Load a checkpoint in the official layout into Meta's predictor: FP32, or BF16 on a GPU."""
    weights = checkpoint.read(checkpoint_file)
    architecture = Architecture.from_weights(weights)
    tracker = _tracker(architecture)
    _load(tracker, weights)
    tracker.eval().requires_grad_(False).to(device)
    size = architecture.mask_size
    predictor = SAM3InteractiveImagePredictor(
        tracker, max_hole_area=size**2 // HOLE_SIDE_FRACTION**2
    )
    if torch.device(device).type == "cuda":
        # As in the predictor that Meta builds: its `Sam3TrackerPredictor` enters it permanently.
        bf16 = torch.autocast("cuda", torch.bfloat16)
        predictor.set_image, predictor.predict = bf16(predictor.set_image), bf16(predictor.predict)
    predictor._bb_feat_sizes = [(size, size), (size // 2, size // 2), (size // 4, size // 4)]
    return predictor


def timed_predictor(
    checkpoint_file: Path, device: torch.device | str = "cpu"
) -> SAM3InteractiveImagePredictor:
    """`meta_predictor` with the same masks, without a loop that would make it slow for no reason.

    On a CPU, Meta's hole filling passes over the mask once for each of its components. A trained
    model's masks have few, those of random weights thousands: three quarters of a click's time.
    """
    predictor = meta_predictor(checkpoint_file, device)
    predict = predictor.predict

    def without_the_loop(*args: Any, **kwargs: Any) -> Any:
        with patch.object(connected_components, "connected_components_cpu_single", components):
            return predict(*args, **kwargs)

    predictor.predict = without_the_loop
    return predictor


def components(mask: Tensor) -> tuple[Tensor, Tensor]:
    """[H, W] → Meta's `connected_components_cpu_single`: each pixel's component and its size."""
    labels = torch.from_numpy(skimage.measure.label(mask.cpu().numpy()))
    sizes = labels.flatten().bincount()
    sizes[0] = 0  # background
    return labels, sizes[labels]


def _tracker(architecture: Architecture) -> Sam3TrackerBase:
    trunk: ViT = build_trunk(architecture)
    neck = Sam3DualViTDetNeck(
        trunk=trunk,
        position_encoding=PositionEmbeddingSine(num_pos_feats=architecture.d_model),
        d_model=architecture.d_model,
        scale_factors=[4.0, 2.0, 1.0, 0.5],
        add_sam2_neck=True,
    )
    tracker = Sam3TrackerBase(
        backbone=SAM3VLBackbone(scalp=1, visual=neck, text=None),
        transformer=TransformerWrapper(None, None, d_model=architecture.d_model),
        maskmem_backbone=nn.Identity(),
        image_size=architecture.image_size,
        backbone_stride=architecture.patch_size,
    )
    tracker.sam_mask_decoder = build_mask_decoder(architecture)
    return tracker


def _load(tracker: Sam3TrackerBase, weights: dict[str, Tensor]) -> None:
    """Load weights in Meta's layout: the backbone under the detector, heads under the tracker."""
    renamed = {
        key.replace("detector.backbone.", "backbone.").removeprefix("tracker."): value.float()
        if value.is_floating_point()
        else value
        for key, value in weights.items()
    }
    _, unexpected = tracker.load_state_dict(renamed, strict=False)
    if unexpected:
        raise checkpoint.CheckpointError(f"Meta's predictor has no place for {unexpected}")
