"""Kept images: embeddings that wait for the next click, evicted least recently used first."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from memory import FREE_BYTES, give_back_freed_memory
from torch import Tensor

ID_BYTES = 16
"""Random bytes in an id: enough that nobody can find another caller's by trying."""


class Features(NamedTuple):
    """The encoder's embeddings of one image."""

    image_embed: Tensor
    """[256, E, E]"""
    high_res_feats_0: Tensor
    """[32, 4E, 4E]"""
    high_res_feats_1: Tensor
    """[64, 2E, 2E]"""

    def kept_copy(self) -> Features:
        """A copy that outlives the request that owns these tensors' memory.

        It is channels last in memory, which is how the decoder reads it: this saves a sixth of a
        full-size click.
        """
        copied = Features(*(_channels_last(tensor) for tensor in self))
        if copied.image_embed.is_cuda:  # the copy is asynchronous
            torch.cuda.current_stream(copied.image_embed.device).synchronize()
        return copied

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self)


def _channels_last(image: Tensor) -> Tensor:
    """A copy of the same shape [C, H, W], laid out in memory as [H, W, C]."""
    return image.unsqueeze(0).clone(memory_format=torch.channels_last).squeeze(0)


class ImageNotKept(KeyError):
    """No image is kept under this id: it was never issued, or the image has been evicted."""


class StoreTooSmall(Exception):
    """The images to keep are larger than the store; the message is the answer to the caller."""


@dataclass
class Counts:
    """The store's counters since it was created."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0


@dataclass
class _Entry:
    features: Features
    used_at: float


@dataclass
class ImageStore:
    """An LRU of embeddings, bounded in bytes and idle seconds; thread-safe."""

    max_bytes: int
    max_idle_seconds: float
    clock: Callable[[], float] = time.monotonic
    counts: Counts = field(default_factory=Counts, init=False, repr=False)
    nbytes: int = field(default=0, init=False, repr=False)
    _peak_bytes: int = field(default=0, init=False, repr=False)
    """Most bytes that sweeps have seen since memory was last given back."""
    _entries: OrderedDict[str, _Entry] = field(default_factory=OrderedDict, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __len__(self) -> int:
        return len(self._entries)

    def check_size(self, images: Sequence[Features]) -> None:
        """Raise `StoreTooSmall` if these images do not fit into the store together."""
        nbytes = sum(image.nbytes for image in images)
        if nbytes > self.max_bytes:
            raise StoreTooSmall(
                f"keep_image is not possible: this request's embeddings take {nbytes} bytes, but "
                f"this server keeps at most {self.max_bytes} in all; ask without keep_image or for "
                "fewer images at a time, or raise kept_images_bytes in sam3_prompt_decoder's config"
            )

    def keep(self, features: Features) -> str:
        """Keep a copy and return its id, which nobody can choose or guess.

        Raises `StoreTooSmall`.
        """
        self.check_size([features])
        image_id = secrets.token_urlsafe(ID_BYTES)
        kept = features.kept_copy()
        with self._lock:
            self._evict_idle()
            self._entries[image_id] = _Entry(kept, self.clock())
            self.nbytes += kept.nbytes
            while self.nbytes > self.max_bytes:
                self._evict()
        return image_id

    def get(self, image_id: str) -> Features:
        """The embeddings kept under an id. Raises `ImageNotKept`."""
        with self._lock:
            self._evict_idle()
            entry = self._entries.get(image_id)
            if entry is None:
                self.counts.misses += 1
                raise ImageNotKept(image_id)
            self.counts.hits += 1
            entry.used_at = self.clock()
            self._entries.move_to_end(image_id)
            return entry.features

    def sweep(self) -> None:
        """Evict idle images now rather than at the next request.

        Their memory is given back once there is enough of it; until then it is kept for new images.
        """
        with self._lock:
            self._peak_bytes = max(self._peak_bytes, self.nbytes)
            self._evict_idle()
            enough = self._peak_bytes - self.nbytes >= FREE_BYTES
            if enough:
                self._peak_bytes = self.nbytes
        if enough:
            give_back_freed_memory()

    def _evict_idle(self) -> None:
        """Evict idle entries, which come first: entries are in order of last use."""
        oldest_allowed = self.clock() - self.max_idle_seconds
        while self._entries and next(iter(self._entries.values())).used_at < oldest_allowed:
            self._evict()

    def _evict(self) -> None:
        _, entry = self._entries.popitem(last=False)
        self.nbytes -= entry.features.nbytes
        self.counts.evictions += 1
