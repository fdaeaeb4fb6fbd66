"""What is asked of images, and room for what is answered: launches write, jobs read.

Jobs that get equally many masks an object lie side by side, so that usually a launch is written
at once, and everything goes from a GPU to the host in one piece.
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

LOGIT_LIMIT = 32.0
"""Returned logits are clamped to ±32, as Meta's predictor does."""

Launch = list[tuple[int, int]]
"""Objects that run together, all of one token count: the job's and the object's number."""


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
    """Masks of N objects, K of each."""

    low_res_masks: Tensor
    """FP16 [N, K, M, M]"""
    iou_predictions: Tensor
    """FP32 [N, K]"""
    sums: Tensor
    """FP32 [N], of all that is said of an object: finite where all of it is."""

    def __getitem__(self, rows: slice) -> Masks:
        return Masks(self.low_res_masks[rows], self.iou_predictions[rows], self.sums[rows])

    @property
    def is_finite(self) -> bool:
        """By the sums, for masks in host memory."""
        return math.isfinite(self.sums.sum())


class Answers:
    """Masks for every object of every job, on the device until `by_job`."""

    def __init__(self, jobs: Sequence[Job], device: torch.device) -> None:
        self._jobs = jobs
        self._device = device
        self._first: list[int] = []
        """Each job's first row in the room of its K."""
        rows: Counter[int] = Counter()
        for job in jobs:
            self._first.append(rows[job.candidates])
            rows[job.candidates] += len(job.objects)
        self._rooms = {k: _room(count, k, jobs[0].features, device) for k, count in rows.items()}

    def put(self, launch: Launch, logits: Tensor, ious: Tensor) -> None:
        """Write what the jobs asked for of a launch's masks, clamping these where they are.

        logits: FP32 [R, 4, M, M], ious: FP32 [R, 4], of its R objects.
        """
        row = 0
        for _, alike in groupby(launch, lambda member: _asked(self._jobs[member[0]])):
            members = list(alike)
            rows = slice(row, row + len(members))
            row = rows.stop
            job = self._jobs[members[0][0]]
            self._write(members, job.candidates, *_choose(job, logits[rows], ious[rows]))

    def _write(self, members: Launch, candidates: int, logits: Tensor, ious: Tensor) -> None:
        where = _selection([self._first[j] + n for j, n in members])
        room = self._rooms[candidates]
        clamped = logits.clamp_(-LOGIT_LIMIT, LOGIT_LIMIT)
        room.sums[where] = clamped.sum((1, 2, 3)) + ious.sum(1)
        # Assigning to a slice converts as it copies; to a list of rows it does not convert.
        room.low_res_masks[where] = clamped if isinstance(where, slice) else clamped.half()
        room.iou_predictions[where] = ious

    def by_job(self) -> list[Masks]:
        """Each job's masks, in host memory: whoever asks is there."""
        rooms = self._rooms
        if self._device.type != "cpu":
            rooms = {k: _pinned(room) for k, room in rooms.items()}
            # After this the device is done with what it was asked.
            torch.cuda.current_stream(self._device).synchronize()
        return [
            rooms[job.candidates][first : first + len(job.objects)]
            for job, first in zip(self._jobs, self._first, strict=True)
        ]


def _room(objects: int, candidates: int, image: Features, device: torch.device) -> Masks:
    side = image.high_res_feats_0.shape[-1]
    return Masks(
        torch.empty((objects, candidates, side, side), dtype=torch.float16, device=device),
        torch.empty((objects, candidates), device=device),
        torch.empty(objects, device=device),
    )


def _pinned(masks: Masks) -> Masks:
    """Copies in host memory that the device writes by itself; there once it was waited for."""
    tensors = (masks.low_res_masks, masks.iou_predictions, masks.sums)
    hosts = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
    return Masks(*(h.copy_(t, non_blocking=True) for h, t in zip(hosts, tensors, strict=True)))


def _asked(job: Job) -> tuple[bool, bool]:
    return job.multimask_output, job.best_only


def _choose(job: Job, logits: Tensor, ious: Tensor) -> tuple[Tensor, Tensor]:
    """What a job asked for of the program's four masks of each object (see export/decoder.py)."""
    if not job.multimask_output:
        return logits[:, :1], ious[:, :1]
    if not job.best_only:
        return logits[:, 1:], ious[:, 1:]
    objects, candidates = ious.shape
    best = 1 + ious[:, 1:].argmax(1) + candidates * torch.arange(objects, device=ious.device)
    # A plane at a time: `logits[object, best]` takes twice as long for one object of a 1008 model
    # and three times for eight.
    chosen = logits.flatten(0, 1).index_select(0, best), ious.flatten().index_select(0, best)
    return chosen[0].unsqueeze(1), chosen[1].unsqueeze(1)


def _selection(rows: list[int]) -> slice | list[int]:
    """Rows as an index; neighbours, the usual case, as a slice, which needs no copy."""
    first, last = rows[0], rows[-1]
    return slice(first, last + 1) if last - first + 1 == len(rows) else rows
