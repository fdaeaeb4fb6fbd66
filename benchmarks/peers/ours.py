"""This project, as users call it."""

from __future__ import annotations

from benchmarks.peers import Click, Photo
from triton_sam3 import Client


class Ours:
    """`Client.open` once, then click by id."""

    def __init__(self, url: str) -> None:
        self.client = Client(url, timeout=600, remember_images=0)

    def open(self, photo: Photo) -> Click:
        view = self.client.open(photo)
        return lambda x, y: view.segment(points=[(x, y)]).masks[0]

    def close(self) -> None:
        self.client.close()
