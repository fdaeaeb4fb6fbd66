"""Ways to click on an image: ours, and those it is compared with.

    ours            image kept on the server, a click sends its id        (triton_sam3.Client)
    embeddings      encoder outputs returned, sent back with every click  (same server)
    whole           Meta's predictor inside a Triton Python backend       (Triton, one image)
    http            Meta's predictor behind HTTP, one lock, one cache     (no Triton)
    in process      Meta's predictor, no server at all

Each opens an image of any size and then answers clicks with the best of three masks, boolean, at
the image's size. Only `in_process` and the servers need torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Photo = NDArray[np.uint8]
"""RGB [H, W, 3]."""
Mask = NDArray[np.bool_]
"""[H, W]."""
Click = Callable[[float, float], Mask]
"""x, y in pixels of the photo → the mask there."""


class Peer(Protocol):
    """One way to click, from the caller's side."""

    def open(self, photo: Photo) -> Click:
        """Have an image encoded, and kept where this peer keeps images."""
        ...

    def close(self) -> None: ...


def best(masks: NDArray[Any], scores: NDArray[np.float32]) -> Mask:
    """The candidate with the highest predicted IoU, from [3, H, W] and [3]."""
    chosen: Mask = np.asarray(masks[int(scores.argmax())]) > 0
    return chosen
