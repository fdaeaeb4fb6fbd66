"""Jobs, one for each image of a request, and buffers for the masks that answer them.

Jobs that get the same number of masks per object are stored next to each other, so a launch is
usually written at once, and everything is copied from a GPU to the host in one piece. A replay's
best masks (replay.py) are used as answers directly.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from prompts import ObjectPrompt
from store import Features
from torch import Tensor

MAX_PINNED_BYTES = 64 * 2**20
"""Largest answer, in bytes, copied through page-locked memory, which torch never frees: three masks
each of some 130 objects. A larger one takes several times as long to copy, and its memory is
freed."""

LOGIT_LIMIT = 32.0
"""Returned logits are clamped to ±32, as Meta's predictor does."""

Launch = list[tuple[int, int]]
"""Objects that run together, all with the same token count: (job index, object index)."""


@dataclass(frozen=True)
class Job:
    """The objects of one image and what to answer about them."""

    features: Features
    objects: Sequence[ObjectPrompt]
    multimask_output: bool = True
    best_only: bool = False

    @property
    def candidates(self) -> int:
        """K: how many masks each object gets."""
        return 3 if self.multimask_output and not self.best_only else 1


@dataclass(frozen=True)
class Masks:
    """Masks of N objects, K each."""

    low_res_masks: Tensor
    """FP16 [N, K, M, M]"""
    iou_predictions: Tensor
    """FP32 [N, K]"""
    sums: Tensor
    """FP32 [N], over all of an object's values: finite if all of them are."""

    def __getitem__(self, rows: slice) -> Masks:
        return Masks(self.low_res_masks[rows], self.iou_predictions[rows], self.sums[rows])

    @property
    def is_finite(self) -> bool:
        """Whether all values are finite, judged by the sums; for masks in host memory."""
        return math.isfinite(self.sums.sum())


class MaskBuffer:
    """Contiguous memory for the masks of several objects: one copy brings it to the host."""

    def __init__(self, objects: int, candidates: int, side: int, device: torch.device) -> None:
        self._shape = (objects, candidates, side, side)
        ious = 4 * objects * candidates
        self._splits = [ious, ious + 4 * objects]
        size = self._splits[-1] + 2 * math.prod(self._shape)
        self._bytes = torch.empty(size, dtype=torch.uint8, device=device)
        self.masks = self._views(self._bytes)

    def write(self, where: slice | list[int], logits: Tensor, ious: Tensor) -> None:
        """Write rows, clamping the logits [R, K, M, M] in place; ious: [R, K]."""
        clamped = logits.clamp_(-LOGIT_LIMIT, LOGIT_LIMIT)
        written = (
            (self.masks.sums, clamped.sum((1, 2, 3)) + ious.sum(1)),
            (self.masks.low_res_masks, clamped),
            (self.masks.iou_predictions, ious),
        )
        if isinstance(where, slice):
            for buffer, values in written:
                buffer[where] = values  # converts as it copies
            return
        # Indexing with a list would make the host wait for everything queued on the GPU.
        rows = torch.tensor(where).to(self._bytes.device, non_blocking=True)
        for buffer, values in written:
            buffer.index_copy_(0, rows, values.to(buffer.dtype))

    def copy_to_host(self) -> Masks:
        """Start copying what was written; the copy is complete once the device has caught up."""
        source = self._bytes
        pinned = source.is_cuda and source.nbytes <= MAX_PINNED_BYTES
        host = torch.empty(source.shape, dtype=source.dtype, pin_memory=pinned)
        return self._views(host.copy_(source, non_blocking=True))

    def _views(self, buffer: Tensor) -> Masks:
        ious, sums, masks = buffer.tensor_split(self._splits)
        return Masks(
            masks.view(torch.float16).view(self._shape),
            ious.view(torch.float32).view(self._shape[:2]),
            sums.view(torch.float32),
        )


class Answers:
    """Masks for every object of every job: written as they are made, read once they arrive."""

    def __init__(self, jobs: Sequence[Job], device: torch.device) -> None:
        self._jobs = jobs
        self._device = device
        self._first_rows: list[int] = []
        """Each job's first row in the buffer for its K."""
        self._row_counts: Counter[int] = Counter()
        for job in jobs:
            self._first_rows.append(self._row_counts[job.candidates])
            self._row_counts[job.candidates] += len(job.objects)
        self._buffers: dict[int, MaskBuffer] = {}
        """By K."""
        self._by_job: dict[int, Masks] = {}
        """Masks of jobs that are not in a buffer."""
        self._on_host: dict[int, Masks] = {}
        """The buffers' copies in host memory, by K."""
        self._ready_event: torch.cuda.Event | None = None

    def put(self, launch: Launch, logits: Tensor, ious: Tensor) -> None:
        """Write the masks of a launch that its jobs asked for, clamping the logits in place.

        logits: FP32 [R, 4, M, M], ious: FP32 [R, 4], for its R objects.
        """
        row = 0
        for _, alike in groupby(launch, lambda member: _options(self._jobs[member[0]])):
            members = list(alike)
            rows = slice(row, row + len(members))
            row = rows.stop
            job = self._jobs[members[0][0]]
            where = _as_index([self._first_rows[j] + n for j, n in members])
            self._buffer(job.candidates).write(where, *_choose(job, logits[rows], ious[rows]))

    def wants_only_best(self, launch: Launch) -> bool:
        """Whether a launch holds all objects of its jobs, which all want only the best mask."""
        counts = Counter(j for j, _ in launch)
        return all(
            self._jobs[j].best_only
            and self._jobs[j].multimask_output
            and count == len(self._jobs[j].objects)
            for j, count in counts.items()
        )

    def put_best(self, launch: Launch, best: Masks) -> None:
        """Answer with masks that are already chosen and on their way to host memory."""
        row = 0
        for j, members in groupby(launch, lambda member: member[0]):
            rows = slice(row, row + len(list(members)))
            row = rows.stop
            self._by_job[j] = best[rows]

    def copy_to_host(self) -> None:
        """Queue the copy of everything that was put, to run once the device has finished it."""
        missing = {job.candidates for j, job in enumerate(self._jobs) if j not in self._by_job}
        buffers = {candidates: self._buffer(candidates) for candidates in missing}
        if self._device.type == "cpu":
            self._on_host = {k: buffer.masks for k, buffer in buffers.items()}
            return
        self._on_host = {k: buffer.copy_to_host() for k, buffer in buffers.items()}
        self._ready_event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._ready_event.record(torch.cuda.current_stream(self._device))

    def by_job(self) -> list[Masks]:
        """Each job's masks, in host memory; waits until they have arrived."""
        if self._ready_event is not None:
            self._ready_event.synchronize()
        return [self._masks_of(j) for j in range(len(self._jobs))]

    def _masks_of(self, j: int) -> Masks:
        if j in self._by_job:
            return self._by_job[j]
        job, first = self._jobs[j], self._first_rows[j]
        return self._on_host[job.candidates][first : first + len(job.objects)]

    def _buffer(self, candidates: int) -> MaskBuffer:
        if candidates not in self._buffers:
            rows = self._row_counts[candidates]
            side = self._jobs[0].features.high_res_feats_0.shape[-1]
            self._buffers[candidates] = MaskBuffer(rows, candidates, side, self._device)
        return self._buffers[candidates]


def _options(job: Job) -> tuple[bool, bool]:
    return job.multimask_output, job.best_only


def _choose(job: Job, logits: Tensor, ious: Tensor) -> tuple[Tensor, Tensor]:
    """Those of the program's four masks per object (export/decoder.py) that a job asks for."""
    if not job.multimask_output:
        return logits[:, :1], ious[:, :1]
    return best_of(logits, ious) if job.best_only else (logits[:, 1:], ious[:, 1:])


def best_of(logits: Tensor, ious: Tensor) -> tuple[Tensor, Tensor]:
    """Each object's candidate with the highest score, out of three: [R, 1, M, M], [R, 1]."""
    objects, candidates = ious.shape
    best = 1 + ious[:, 1:].argmax(1) + candidates * torch.arange(objects, device=ious.device)
    # Selects whole planes: `logits[object, best]` takes twice as long for one object of a 1008
    # model and three times as long for eight.
    chosen = logits.flatten(0, 1).index_select(0, best), ious.flatten().index_select(0, best)
    return chosen[0].unsqueeze(1), chosen[1].unsqueeze(1)


def _as_index(rows: list[int]) -> slice | list[int]:
    """Rows as an index; consecutive ones, the usual case, as a slice, which needs no copy."""
    first, last = rows[0], rows[-1]
    return slice(first, last + 1) if last - first + 1 == len(rows) else rows
