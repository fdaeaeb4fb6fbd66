"""Which image the server keeps under which id."""

import threading
from collections import OrderedDict
from collections.abc import Callable

from .flow import Lock


class ImageSlot:
    """One image's id on the server; everything that asks about the image shares the slot.

    Whoever fills the slot holds `lock`, so that callers who ask about a new image at the same
    moment wait for one encoding instead of starting several.
    """

    def __init__(self, lock: Lock) -> None:
        self.image_id: bytes | None = None
        self.unkept = False
        """Whether the server, asked to keep the image, last said that it keeps none."""
        self.lock = lock

    def fill(self, image_id: bytes) -> None:
        """Note what the server answered: an id, or an empty one."""
        self.image_id = image_id or None
        self.unkept = not image_id

    def forget(self, image_id: bytes) -> None:
        """Drop a lost id, unless another caller has already put a new one in its place."""
        if self.image_id == image_id:
            self.image_id = None


class ImageMemory:
    """The slots of the `limit` images asked about last, by content digest. Thread-safe."""

    def __init__(self, limit: int, make_lock: Callable[[], Lock]) -> None:
        self._limit = limit
        self._make_lock = make_lock
        self._slots: OrderedDict[str, ImageSlot] = OrderedDict()
        self._guard = threading.Lock()

    def slot(self, digest: str) -> ImageSlot:
        """The image's slot; a fresh one of its own where nothing is to be remembered."""
        with self._guard:
            slot = self._slots.pop(digest, None) or ImageSlot(self._make_lock())
            self._slots[digest] = slot
            while len(self._slots) > self._limit:
                self._slots.popitem(last=False)
            return slot
