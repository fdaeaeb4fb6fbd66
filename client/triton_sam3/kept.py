"""Which images the server keeps, and under which ids."""

import threading
from collections import OrderedDict
from collections.abc import Callable

from .flow import Lock


class ImageSlot:
    """The id of one image on the server; all requests about the image share the slot.

    The caller that fills the slot holds `lock`, so that concurrent requests about a new image wait
    for one encoding instead of starting several.
    """

    def __init__(self, lock: Lock) -> None:
        self.image_id: bytes | None = None
        self.declined = False
        """Whether the server did not keep the image when it was last asked to."""
        self.lock = lock

    def fill(self, image_id: bytes) -> None:
        """Store the server's answer: an id, or an empty one if the image is not kept."""
        self.image_id = image_id or None
        self.declined = not image_id

    def forget(self, image_id: bytes) -> None:
        """Drop a lost id, unless another caller has already put a new one in its place."""
        if self.image_id == image_id:
            self.image_id = None


class ImageMemory:
    """The slots of the `limit` most recently used images, by content digest. Thread-safe."""

    def __init__(self, limit: int, make_lock: Callable[[], Lock]) -> None:
        self._limit = limit
        self._make_lock = make_lock
        self._slots: OrderedDict[str, ImageSlot] = OrderedDict()
        self._lock = threading.Lock()

    def slot(self, digest: str) -> ImageSlot:
        """The image's slot; with a limit of 0, a new one every time."""
        with self._lock:
            slot = self._slots.pop(digest, None) or ImageSlot(self._make_lock())
            self._slots[digest] = slot
            while len(self._slots) > self._limit:
                self._slots.popitem(last=False)
            return slot
