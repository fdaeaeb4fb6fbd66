"""Clicks on a GPU as one launch: starting their kernels one by one takes longer than running them.

Each supported shape is recorded once as a CUDA graph, from the caller's prompts to the best mask of
each object, ready to be returned; later inputs of that shape are copied into the recorded buffers
and replayed. Everything else (many objects, many tokens) runs without a graph: there the kernels'
own time dominates.

    prompts, one copy ─┐                                             ┌─► best masks, one copy back
    images, three ─────┴─► buffers ─► program ─► choose, clamp, FP16 ┴─► masks of all candidates
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from jobs import MaskBuffer, Masks, best_of
from launches import LaunchInputs, stack, stack_masks
from program import Program, first_line
from store import Features
from torch import Tensor

WARM_UP_RUNS = 3
"""Runs before recording, in which cuBLAS and cuDNN choose algorithms and allocate memory."""

NUMBERS_PER_TOKEN = 3
"""x, y and the label, 4 bytes each."""


class ClickReplay:
    """Recordings of a program, by the shape of its inputs."""

    def __init__(self, program: Program, device: torch.device) -> None:
        self._program = program
        self._device = device
        self._recordings: dict[tuple[int, int, int], Recording] = {}
        self._buffers: Features | None = None
        """Image buffers, by far the largest, shared by all recordings: the first recording must
        have the most objects."""
        # Shared by all: an answer is copied before the next replay can overwrite it.
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.first_error = ""
        """Why some shapes could not be recorded and run without replay."""

    def record(self, inputs: LaunchInputs) -> None:
        """Record the shape of these inputs unless it has been recorded."""
        if inputs.shape in self._recordings:
            return
        if self._buffers is None:
            self._buffers = Features(*map(stack, zip(*inputs.images, strict=True)))
        try:
            self._recordings[inputs.shape] = Recording(
                self._program, inputs, self._buffers, self._device, self._pool
            )
        except RuntimeError as error:
            # Later errors may be consequences of the first.
            self.first_error = self.first_error or first_line(error)

    def find(self, inputs: LaunchInputs) -> Recording | None:
        """The recording for inputs of this shape and type, if there is one."""
        recording = self._recordings.get(inputs.shape)
        return recording if recording and recording.accepts(inputs.images[0]) else None


class Recording:
    """The program's kernels on inputs and outputs at fixed addresses."""

    def __init__(
        self,
        program: Program,
        inputs: LaunchInputs,
        buffers: Features,
        device: torch.device,
        pool: Any,
    ) -> None:
        objects, tokens, masks = inputs.shape
        side = buffers.high_res_feats_0.shape[-1]
        self._images = Features(*(buffer[:objects] for buffer in buffers))
        self._prompts = torch.empty(
            NUMBERS_PER_TOKEN * objects * tokens, dtype=torch.int32, device=device
        )
        self._masks = torch.empty((masks, side, side), device=device)
        self._best = MaskBuffer(objects, 1, side, device)
        self._load(inputs)
        coords, labels = self._prompts.tensor_split([2 * objects * tokens])
        # Kept alive: the graph refers to them by address.
        self._inputs = {
            **self._images._asdict(),
            "point_coords": coords.view(torch.float32).view(objects, tokens, 2),
            "point_labels": labels.view(objects, tokens),
            "mask_input": self._masks,
            # A launch on a GPU has masks for all objects or for none.
            "mask_index": torch.arange(masks, device=device),
        }
        self._outputs, self._replay = _record(partial(self._run, program), device, pool)

    def accepts(self, image: Features) -> bool:
        """Whether the image has the recorded type."""
        return image.image_embed.dtype == self._images.image_embed.dtype

    def __call__(self, inputs: LaunchInputs) -> tuple[Tensor, Tensor]:
        """Like the program: logits and IoUs of all candidates, which the next call overwrites."""
        self._load(inputs)
        self._replay()
        return self._outputs

    def best(self) -> Masks:
        """Each object's best mask from the latest call, on its way to host memory."""
        return self._best.copy_to_host()

    def _run(self, program: Program) -> tuple[Tensor, Tensor]:
        logits, ious = program(**self._inputs)
        self._best.write(slice(len(ious)), *best_of(logits, ious))
        return logits, ious

    def _load(self, inputs: LaunchInputs) -> None:
        """Copy inputs into the recorded buffers without waiting for the device."""
        shared = inputs.shared_image
        for n, buffer in enumerate(self._images):
            if shared is not None:
                buffer.copy_(shared[n])
            else:
                stack([image[n] for image in inputs.images], out=buffer)
        numbers = np.concatenate((inputs.coords.ravel().view(np.int32), inputs.labels.ravel()))
        self._prompts.copy_(torch.from_numpy(numbers), non_blocking=True)
        if inputs.masks:
            self._masks.copy_(stack_masks(inputs.masks, self._masks.device))


def _record(
    run: Callable[[], tuple[Tensor, Tensor]], device: torch.device, pool: Any
) -> tuple[tuple[Tensor, Tensor], Callable[[], None]]:
    """Return outputs that stay in the same memory, and a function that computes them anew."""
    side_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side_stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side_stream):
        for _ in range(WARM_UP_RUNS):
            run()
    torch.cuda.current_stream(device).wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    # Calls that unrelated threads make to CUDA meanwhile do not abort the recording.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        outputs = run()
    return outputs, graph.replay
