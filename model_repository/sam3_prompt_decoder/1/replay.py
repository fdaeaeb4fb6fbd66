"""Clicks on a GPU as one launch: starting their kernels one by one takes longer than they do.

Each shape that is wanted is recorded once as a CUDA graph, from the caller's prompts to the best
mask of each object as it is answered; what comes later in such a shape is copied into what was
recorded and replayed. Everything else (many objects, many tokens) runs as it is: there the kernels'
own time counts.

    prompts, one copy ─┐                                           ┌─► best masks, one copy back
    images, three ─────┴─► rooms ─► program ─► choose, clamp, FP16 ┴─► masks of all candidates
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from jobs import Masks, Room, best_of
from launches import Inputs, stack, stack_masks
from program import Program, first_line
from store import Features
from torch import Tensor

WARM_UP_RUNS = 3
"""Before recording: cuBLAS and cuDNN choose and allocate then."""

NUMBERS_A_TOKEN = 3
"""x, y and the label, 4 bytes each."""


class ClickReplay:
    """Recordings of a program by the shape of what it decodes."""

    def __init__(self, program: Program, device: torch.device) -> None:
        self._program = program
        self._device = device
        self._recordings: dict[tuple[int, int, int], Recording] = {}
        self._rooms: Features | None = None
        """The images' of all recordings, by far the largest: the first recording is to have most
        objects."""
        # One for all: an answer is copied before the next replay may write over it.
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.refusal = ""
        """Why what has some shape runs as it is."""

    def record(self, inputs: Inputs) -> None:
        """Record a shape that was not recorded."""
        if inputs.shape in self._recordings:
            return
        if self._rooms is None:
            self._rooms = Features(*map(stack, zip(*inputs.images, strict=True)))
        try:
            self._recordings[inputs.shape] = Recording(
                self._program, inputs, self._rooms, self._device, self._pool
            )
        except RuntimeError as error:
            self.refusal = self.refusal or first_line(error)  # those after it may be its effects

    def find(self, inputs: Inputs) -> Recording | None:
        """What was recorded of such inputs."""
        recording = self._recordings.get(inputs.shape)
        return recording if recording and recording.takes(inputs.images[0]) else None


class Recording:
    """The program's kernels on inputs and outputs that stay where they are."""

    def __init__(
        self, program: Program, inputs: Inputs, rooms: Features, device: torch.device, pool: Any
    ) -> None:
        objects, tokens, masks = inputs.shape
        side = rooms.high_res_feats_0.shape[-1]
        self._images = Features(*(room[:objects] for room in rooms))
        self._prompts = torch.empty(
            NUMBERS_A_TOKEN * objects * tokens, dtype=torch.int32, device=device
        )
        self._masks = torch.empty((masks, side, side), device=device)
        self._best = Room(objects, 1, side, device)
        self._load(inputs)
        places, labels = self._prompts.tensor_split([2 * objects * tokens])
        # Kept: what is replayed finds them by their address.
        self._given = {
            **self._images._asdict(),
            "point_coords": places.view(torch.float32).view(objects, tokens, 2),
            "point_labels": labels.view(objects, tokens),
            "mask_input": self._masks,
            # A launch on a GPU has masks of all objects or of none.
            "mask_index": torch.arange(masks, device=device),
        }
        self._outputs, self._replay = _record(partial(self._run, program), device, pool)

    def takes(self, image: Features) -> bool:
        """Whether the image is of the type that was recorded."""
        return image.image_embed.dtype == self._images.image_embed.dtype

    def __call__(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """As the program: logits and IoUs of all candidates, which the next call overwrites."""
        self._load(inputs)
        self._replay()
        return self._outputs

    def best(self) -> Masks:
        """Each object's best mask of the latest call, on its way to host memory."""
        return self._best.on_host()

    def _run(self, program: Program) -> tuple[Tensor, Tensor]:
        logits, ious = program(**self._given)
        self._best.write(slice(len(ious)), *best_of(logits, ious))
        return logits, ious

    def _load(self, inputs: Inputs) -> None:
        """Copy inputs to where they were recorded; nothing waits for it."""
        shared = inputs.shared_image
        for n, room in enumerate(self._images):
            if shared is not None:
                room.copy_(shared[n])
            else:
                stack([image[n] for image in inputs.images], out=room)
        numbers = np.concatenate((inputs.coords.ravel().view(np.int32), inputs.labels.ravel()))
        self._prompts.copy_(torch.from_numpy(numbers), non_blocking=True)
        if inputs.masks:
            self._masks.copy_(stack_masks(inputs.masks, self._masks.device))


def _record(
    run: Callable[[], tuple[Tensor, Tensor]], device: torch.device, pool: Any
) -> tuple[tuple[Tensor, Tensor], Callable[[], None]]:
    """What it answers, always in the same memory, and how to have it answer anew."""
    aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP_RUNS):
            run()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # What threads that are none of ours ask of CUDA meanwhile does not end the recording.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        outputs = run()
    return outputs, graph.replay
