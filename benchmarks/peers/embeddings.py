"""Embeddings over the wire: encoder outputs go to the caller and come back with every click.

This is how stateless servers work. Same encoder, decoder and post-processing as ours.
"""

from __future__ import annotations

from benchmarks.peers import Click, Mask, Photo
from benchmarks.wire import Wire
from triton_sam3 import contract
from triton_sam3.geometry import resize
from triton_sam3.masks import finish_masks


class EmbeddingsOverTheWire:
    def __init__(self, url: str) -> None:
        self._wire = Wire(url)

    def open(self, photo: Photo) -> Click:
        embeddings = self._wire.encode(resize(photo, self._wire.side)[None])
        height, width = photo.shape[:2]

        def click(x: float, y: float) -> Mask:
            answer = self._wire.click(embeddings, x=x / width, y=y / height)
            logits = answer[contract.LOW_RES_MASKS.name][0, :, 0]
            mask: Mask = finish_masks(logits, width, height)[0]
            return mask

        return click

    def close(self) -> None:
        self._wire.close()
