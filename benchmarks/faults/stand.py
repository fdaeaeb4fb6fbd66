"""A server that is restarted when it exits, as by the container's restart policy."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.faults.container import Container
from triton_sam3.contract import DECODER

WATCH = ("--watch-seconds=1", "--watch-timeout=3")
"""The image checks itself every 30 s, which is too slow for a test suite."""
REFUSAL = re.compile(r"^failed to load '|^Poll failed for model directory")
"""How Triton's log names a model that it cannot serve."""
KEPT_BYTES = re.compile(r'(?<=key: "kept_images_bytes" value: { string_value: ")\d+')
FIRST_PAUSE, MAX_PAUSE = 0.1, 60.0
STEADY_SECONDS = 10.0
"""Docker's `restart: unless-stopped`: pauses double until a container has run for this long."""


class Stand:
    """One container under a restart policy; a context manager that leaves nothing behind."""

    def __init__(
        self,
        repository: Path,
        folder: Path,
        *,
        wrapper: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        arguments = ("--host=127.0.0.1", "--drain-seconds=0", "--exit-seconds=5", *WATCH)
        self.container = Container(repository, folder, *arguments, wrapper=wrapper, env=env)
        self.starts = 0
        self.statuses: list[int] = []
        """Exit statuses, in order."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.container.http_port}"

    @property
    def grpc(self) -> str:
        return f"grpc://127.0.0.1:{self.container.grpc_port}"

    def refusal(self) -> str:
        """Why it did not start: the longest such message in its log."""
        messages = [r["message"] for r in self.container.records() if REFUSAL.search(r["message"])]
        return max(messages, key=len, default="")

    def __enter__(self) -> Stand:
        self._start()
        try:
            self.container.wait_until_serving()
        except BaseException:
            self.container.__exit__()
            raise
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.container.__exit__()

    def _start(self) -> None:
        self.container.start()
        self.starts += 1
        self._started = time.monotonic()

    def _keep(self) -> None:
        pause = FIRST_PAUSE
        while not self._stop.wait(0.05):
            status = self.container.process.poll()
            if status is None:
                continue
            self.statuses.append(status)
            steady = time.monotonic() - self._started > STEADY_SECONDS
            pause = FIRST_PAUSE if steady else min(2 * pause, MAX_PAUSE)
            if self._stop.wait(pause):
                return
            self._start()


def variant(repository: Path, folder: Path, kept_bytes: int | None = None) -> Path:
    """A copy of the repository whose files may be changed.

    kept_bytes: replaces the decoder's own bound on kept images. Raises ValueError if its config has
    none.
    """
    copy = folder / "models"
    shutil.copytree(repository, copy, ignore=shutil.ignore_patterns("__pycache__"))
    if kept_bytes is not None:
        path = copy / DECODER / "config.pbtxt"
        text, bounds = KEPT_BYTES.subn(str(kept_bytes), path.read_text(encoding="utf-8"))
        if not bounds:
            raise ValueError(f"{path} does not bound kept images in bytes")
        path.write_text(text, encoding="utf-8")
    return copy
