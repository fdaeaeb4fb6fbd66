"""Launches on the cores of a CPU: several run side by side, a small one runs on one core.

Cores that work on separate launches need not wait for each other at every step: measured on two
cores, a third faster than both working on one launch after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

MIN_OBJECTS = 2
"""A launch of fewer objects finishes sooner on all cores together."""

MIN_IMAGE_TOKENS = 1024
"""Image tokens, over all its objects, of a launch that all cores work on. The other cores have to
be woken at each step of a decode, and they are asleep if the user paused before the click: after
0.3 s, one click of the demo model (784 image tokens) took 14 ms on two cores, in a quarter of cases
20 ms, and 12 ms on one; without a pause, 7.8 ms and 10 ms."""


class Workers:
    """A pool with one thread for each core that PyTorch uses."""

    def __init__(self) -> None:
        self.cores = torch.get_num_threads()
        self._threads = ThreadPoolExecutor(self.cores, thread_name_prefix="decoder")

    def launch_size(self, objects: int) -> int:
        """How many of these objects go into one launch, for launches to run side by side."""
        launches = max(1, min(self.cores, objects // MIN_OBJECTS))
        return -(-objects // launches)

    def map(
        self, work: Callable[[Item], Result], items: Sequence[Item], image_tokens: int
    ) -> Iterator[Result]:
        """Results in the order of the items, at most `cores` of which run at a time.

        If one fails, its error is raised once no other is running: a retry needs their memory.

        image_tokens: of the largest item.
        """
        for start in range(0, len(items), self.cores):
            together = items[start : start + self.cores]
            if len(together) == 1:
                threads = self.cores if image_tokens >= MIN_IMAGE_TOKENS else 1
                yield _work(work, threads, together[0])
                continue
            threads = max(1, self.cores // len(together))
            running = [self._threads.submit(_work, work, threads, item) for item in together]
            try:
                while running:
                    yield running.pop(0).result()
            finally:
                wait(running)


def _work(work: Callable[[Item], Result], threads: int, item: Item) -> Result:
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)  # for this thread only
    with torch.inference_mode():  # each thread has to enter it
        return work(item)
