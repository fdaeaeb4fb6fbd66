"""Meta's predictor in the caller's own process: no server, no wire, one user."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from benchmarks.peers import Click, Mask, Photo, best
from benchmarks.reference import timed_predictor


class InProcess:
    def __init__(self, checkpoint: Path, device: torch.device | str = "cpu") -> None:
        self.predictor = timed_predictor(checkpoint, device)

    def open(self, photo: Photo) -> Click:
        self.predictor.set_image(photo)

        def click(x: float, y: float) -> Mask:
            masks, scores, _ = self.predictor.predict(np.array([[x, y]]), np.array([1]))
            return best(masks, scores)

        return click

    def close(self) -> None:
        pass
