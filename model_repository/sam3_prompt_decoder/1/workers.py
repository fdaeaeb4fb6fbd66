"""Launches on the cores of a CPU: side by side where there are several, a small one on one core.

Cores that work on launches of their own need not wait for each other at every step: measured on
two, a third faster than both on one launch after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

Given = TypeVar("Given")
Made = TypeVar("Made")

LEAST_OBJECTS = 2
"""Fewer in a launch are done sooner by all cores together."""


LEAST_ROWS = 512
"""Image tokens, of all its objects, in a launch that all cores work on. Other cores have to be
woken at each of a decode's steps, and the cores of a person who thought before the click sleep:
after 0.3 s, one click of the demo model (256 rows) took 19 ms on two cores and 6.7 ms on one,
though without a pause 4.6 ms and 5.1 ms."""


class Workers:
    """As many threads as PyTorch uses cores."""

    def __init__(self) -> None:
        self.cores = torch.get_num_threads()
        self._threads = ThreadPoolExecutor(self.cores, thread_name_prefix="decoder")

    def share(self, objects: int) -> int:
        """How many of so many objects make one launch, if launches are to run side by side."""
        launches = max(1, min(self.cores, objects // LEAST_OBJECTS))
        return -(-objects // launches)

    def map(
        self, work: Callable[[Given], Made], items: Sequence[Given], rows: int
    ) -> Iterator[Made]:
        """Results in the order of the items, made at most `cores` at a time.

        rows: image tokens of the largest item.
        """
        for start in range(0, len(items), self.cores):
            together = items[start : start + self.cores]
            if len(together) == 1:
                yield _work(work, self.cores if rows >= LEAST_ROWS else 1, together[0])
                continue
            threads = max(1, self.cores // len(together))
            yield from self._threads.map(partial(_work, work, threads), together)


def _work(work: Callable[[Given], Made], threads: int, item: Given) -> Made:
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)  # for this thread alone
    with torch.inference_mode():  # which each thread enters for itself
        return work(item)
