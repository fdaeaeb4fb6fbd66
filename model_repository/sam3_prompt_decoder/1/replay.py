"""Clicks on a GPU as one launch: starting their kernels one by one takes longer than they do.

Each shape that is wanted is recorded once as a CUDA graph; what comes later in such a shape is
copied into what was recorded and replayed. Everything else (many objects, many tokens) runs as it
is: there the kernels' own time counts.
"""

from __future__ import annotations

from typing import Any

import torch
from program import Program, first_line
from store import Features
from torch import Tensor

WARM_UP_RUNS = 3
"""Before recording: cuBLAS and cuDNN choose and allocate then."""


class ClickReplay:
    """A program, replayed where its inputs have shapes it had while `records` was true.

    It is called as the program is. What it returns is overwritten by the next call.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._recordings: dict[tuple[torch.Size, ...], Program] = {}
        self._images: dict[str, Tensor] = {}
        # One for all: an answer is copied before the next replay may write over it.
        self._pool = torch.cuda.graph_pool_handle()
        self.records = True
        """Whether shapes not seen before are recorded, for which everyone at work has to wait."""
        self.refusal = ""
        """Why what has some shape runs as it is."""

    def __call__(self, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        shapes = tuple(tensor.shape for tensor in inputs.values())
        if self.records and shapes not in self._recordings:
            self._recordings[shapes] = self._record(inputs)
        return self._recordings.get(shapes, self._program)(**inputs)

    def _record(self, inputs: dict[str, Tensor]) -> Program:
        """A recording, or the program itself for what cannot be recorded."""
        try:
            return _Recording(self._program, self._own(inputs), self._pool)
        except RuntimeError as error:
            self.refusal = first_line(error)
            return self._program

    def _own(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies to record from.

        All recordings share the images', by far the largest, which the first recording is to have
        room for.
        """
        own = {name: tensor.clone() for name, tensor in inputs.items()}
        for name in Features._fields:
            own[name] = self._images.setdefault(name, own[name])[: len(own[name])]
        return own


class _Recording:
    """The program's kernels on inputs and outputs that stay where they are."""

    def __init__(self, program: Program, inputs: dict[str, Tensor], pool: Any) -> None:
        self._inputs = inputs
        device = inputs["image_embed"].device
        aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP_RUNS):
                program(**inputs)
        torch.cuda.current_stream(device).wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may go on: the metrics' one forgets idle images.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._outputs = program(**inputs)

    def __call__(self, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        for name, own in self._inputs.items():
            own.copy_(inputs[name])
        self._graph.replay()
        return self._outputs
