"""Launches side by side on a CPU, each on its share of the cores.

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


class Workers:
    """As many threads as PyTorch uses cores."""

    def __init__(self) -> None:
        self.cores = torch.get_num_threads()
        self._threads = ThreadPoolExecutor(self.cores, thread_name_prefix="decoder")

    def share(self, objects: int) -> int:
        """How many of so many objects make one launch, if launches are to run side by side."""
        launches = max(1, min(self.cores, objects // LEAST_OBJECTS))
        return -(-objects // launches)

    def map(self, work: Callable[[Given], Made], items: Sequence[Given]) -> Iterator[Made]:
        """Results in the order of the items, made at most `cores` at a time."""
        for start in range(0, len(items), self.cores):
            together = items[start : start + self.cores]
            if len(together) == 1:
                yield work(together[0])
                continue
            threads = max(1, self.cores // len(together))
            yield from self._threads.map(partial(_work, work, threads), together)


def _work(work: Callable[[Given], Made], threads: int, item: Given) -> Made:
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)  # for this thread alone
    with torch.inference_mode():  # which each thread enters for itself
        return work(item)
