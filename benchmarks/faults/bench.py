"""What faults are tried on: an exported repository, copies of it, and a shared stand."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path

from benchmarks.faults.load import Question, answered_questions
from benchmarks.faults.stand import Stand, variant
from triton_sam3 import Client
from triton_sam3.contract import DECODER


class Bench:
    """The exported repository, a folder for copies and other files, and a shared stand."""

    def __init__(self, repository: Path, folder: Path) -> None:
        self.repository = repository
        self._folder = folder
        self._made = 0
        self._shared = ExitStack()
        self._stand: Stand | None = None
        self._questions: list[Question] = []

    def folder(self) -> Path:
        """Create a new folder."""
        self._made += 1
        made = self._folder / f"{self._made:02d}"
        made.mkdir()
        return made

    def stand(self) -> Stand:
        """The shared stand, for faults that leave the repository unchanged."""
        if self._stand is None:
            self._stand = self._shared.enter_context(Stand(self.repository, self.folder()))
        return self._stand

    def copy(self, kept_bytes: int | None = None) -> Path:
        """A separate copy of the repository, see `variant`."""
        return variant(self.repository, self.folder(), kept_bytes)

    def copy_keeping(self, images: int) -> tuple[Path, int]:
        """A repository that keeps at most that many images, and its bound in bytes."""
        config = (self.repository / DECODER / "config.pbtxt").read_text(encoding="utf-8")
        embedding = re.search(r"dims: \[ 256, (\d+),", config)
        if embedding is None:
            raise ValueError("the decoder's config has no image_embed of 256 channels")
        bound = images * 4096 * int(embedding[1]) ** 2
        return self.copy(bound), bound

    def questions(self, stand: Stand) -> list[Question]:
        """Questions with their right answers, obtained once from the first healthy server."""
        if not self._questions:
            with Client(stand.grpc) as client:
                self._questions = answered_questions(client)
        return self._questions

    def close(self) -> None:
        """Stop the shared stand; the next call of `stand` starts a new one."""
        self._stand = None
        self._shared.close()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
