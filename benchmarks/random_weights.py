"""Checkpoints of any size with seeded random weights, in the official layout."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from export import checkpoint
from export.architecture import Architecture, InteractiveModel


def save_random_checkpoint(architecture: Architecture, path: Path, seed: int) -> None:
    """Write random weights whose masks depend on every layer: no bias or embedding is left zero."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = InteractiveModel(architecture)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02, generator=generator)
    checkpoint.save(model, path)
