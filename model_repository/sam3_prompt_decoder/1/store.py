"""Kept images: embeddings that wait for the next click, least recently used forgotten first."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from memory import FREE_BYTES, give_back_freed_memory
from torch import Tensor

ID_BYTES = 16
"""Random bytes of an id: enough that nobody finds another's by trying."""


class Features(NamedTuple):
    """What the encoder makes of one image."""

    image_embed: Tensor
    """[256, E, E]"""
    high_res_feats_0: Tensor
    """[32, 4E, 4E]"""
    high_res_feats_1: Tensor
    """[64, 2E, 2E]"""

    def own(self) -> Features:
        """A copy that outlives the request whose memory these tensors are.

        A pixel's channels come to lie side by side, which is how the decoder reads them: a sixth of
        a full-size click.
        """
        copied = Features(*(_channels_last(tensor) for tensor in self))
        if copied.image_embed.is_cuda:  # which copies behind our back
            torch.cuda.current_stream(copied.image_embed.device).synchronize()
        return copied

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self)


def _channels_last(image: Tensor) -> Tensor:
    """A copy of the same shape [C, H, W], in memory [H, W, C]."""
    return image.unsqueeze(0).clone(memory_format=torch.channels_last).squeeze(0)


class ImageNotKept(KeyError):
    """No image is kept under this id (any more)."""


class StoreTooSmall(Exception):
    """One image alone is larger than the store; the message is the answer to the caller."""


@dataclass
class Counts:
    """What the store has seen since it was made."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0


@dataclass
class _Entry:
    features: Features
    used: float


@dataclass
class ImageStore:
    """An LRU of embeddings, bounded in bytes and in idle seconds; safe to share among threads."""

    max_bytes: int
    max_idle_seconds: float
    clock: Callable[[], float] = time.monotonic
    counts: Counts = field(default_factory=Counts)
    nbytes: int = 0
    _most_bytes: int = 0
    """Since memory was given back, as sweeps saw it."""
    _entries: OrderedDict[str, _Entry] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __len__(self) -> int:
        return len(self._entries)

    def check_size(self, features: Features) -> None:
        """Raise `StoreTooSmall` when one image alone is larger than the store."""
        if features.nbytes > self.max_bytes:
            raise StoreTooSmall(
                f"keep_image is not possible: one image's embeddings take {features.nbytes} "
                f"bytes, this server keeps {self.max_bytes} in all; ask without keep_image, or "
                "raise kept_images_bytes in sam3_prompt_decoder's config"
            )

    def keep(self, features: Features) -> str:
        """Keep a copy and return the id to ask for it; nobody can choose or guess an id.

        Raises `StoreTooSmall`.
        """
        self.check_size(features)
        image_id = secrets.token_urlsafe(ID_BYTES)
        kept = features.own()
        with self._lock:
            self._forget_idle()
            self._entries[image_id] = _Entry(kept, self.clock())
            self.nbytes += kept.nbytes
            while self.nbytes > self.max_bytes:
                self._evict()
        return image_id

    def get(self, image_id: str) -> Features:
        """The embeddings kept under an id. Raises `ImageNotKept`."""
        with self._lock:
            self._forget_idle()
            entry = self._entries.get(image_id)
            if entry is None:
                self.counts.misses += 1
                raise ImageNotKept(image_id)
            self.counts.hits += 1
            entry.used = self.clock()
            self._entries.move_to_end(image_id)
            return entry.features

    def sweep(self) -> None:
        """Forget idle images now rather than at the next request.

        Their memory is given back once it is much; until then it waits for images to come.
        """
        with self._lock:
            self._most_bytes = max(self._most_bytes, self.nbytes)
            self._forget_idle()
            much = self._most_bytes - self.nbytes >= FREE_BYTES
            if much:
                self._most_bytes = self.nbytes
        if much:
            give_back_freed_memory()

    def _forget_idle(self) -> None:
        """Entries stand in the order of their last use, so the idle ones come first."""
        oldest_allowed = self.clock() - self.max_idle_seconds
        while self._entries and next(iter(self._entries.values())).used < oldest_allowed:
            self._evict()

    def _evict(self) -> None:
        _, entry = self._entries.popitem(last=False)
        self.nbytes -= entry.features.nbytes
        self.counts.evictions += 1
