"""What is asked of images, and room for what is answered: launches write, jobs read.

Jobs that get equally many masks an object lie side by side, so that usually a launch is written
at once, and everything goes from a GPU to the host in one piece. Best masks that were replayed
(replay.py) are answers as they come.
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

MOST_PINNED_BYTES = 64 * 2**20
"""Of one answer in page-locked memory, which torch never gives back: some 130 objects' three masks.
What is larger is copied in a multiple of the time, and its memory freed."""

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


class Room:
    """Memory for the masks of a number of objects, in one piece: one copy brings it to the host."""

    def __init__(self, objects: int, candidates: int, side: int, device: torch.device) -> None:
        self._shape = (objects, candidates, side, side)
        ious = 4 * objects * candidates
        self._ends = [ious, ious + 4 * objects]
        size = self._ends[-1] + 2 * math.prod(self._shape)
        self._bytes = torch.empty(size, dtype=torch.uint8, device=device)
        self.masks = self._cut(self._bytes)

    def write(self, where: slice | list[int], logits: Tensor, ious: Tensor) -> None:
        """Write into rows, clamping the logits [R, K, M, M] where they are; ious: [R, K]."""
        clamped = logits.clamp_(-LOGIT_LIMIT, LOGIT_LIMIT)
        written = (
            (self.masks.sums, clamped.sum((1, 2, 3)) + ious.sum(1)),
            (self.masks.low_res_masks, clamped),
            (self.masks.iou_predictions, ious),
        )
        if isinstance(where, slice):
            for room, values in written:
                room[where] = values  # converts as it copies
            return
        # A list as an index would have the host wait for all that the GPU was given before.
        rows = torch.tensor(where).to(self._bytes.device, non_blocking=True)
        for room, values in written:
            room.index_copy_(0, rows, values.to(room.dtype))

    def on_host(self) -> Masks:
        """A copy of what was written; there once the device was waited for."""
        room = self._bytes
        pinned = room.is_cuda and room.nbytes <= MOST_PINNED_BYTES
        host = torch.empty(room.shape, dtype=room.dtype, pin_memory=pinned)
        return self._cut(host.copy_(room, non_blocking=True))

    def _cut(self, room: Tensor) -> Masks:
        ious, sums, masks = room.tensor_split(self._ends)
        return Masks(
            masks.view(torch.float16).view(self._shape),
            ious.view(torch.float32).view(self._shape[:2]),
            sums.view(torch.float32),
        )


class Answers:
    """Masks for every object of every job: written as they are made, read once they are there."""

    def __init__(self, jobs: Sequence[Job], device: torch.device) -> None:
        self._jobs = jobs
        self._device = device
        self._first: list[int] = []
        """Each job's first row in the room of its K."""
        self._rows: Counter[int] = Counter()
        for job in jobs:
            self._first.append(self._rows[job.candidates])
            self._rows[job.candidates] += len(job.objects)
        self._rooms: dict[int, Room] = {}
        self._by_job: dict[int, Masks] = {}
        """Of jobs whose masks are not in a room."""
        self._left: dict[int, Masks] = {}
        self._arrival: torch.cuda.Event | None = None

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
            where = _selection([self._first[j] + n for j, n in members])
            self._room(job.candidates).write(where, *_choose(job, logits[rows], ious[rows]))

    def are_best_of(self, launch: Launch) -> bool:
        """Whether a launch's best masks answer jobs as a whole."""
        counts = Counter(j for j, _ in launch)
        return all(
            self._jobs[j].best_only
            and self._jobs[j].multimask_output
            and count == len(self._jobs[j].objects)
            for j, count in counts.items()
        )

    def put_best(self, launch: Launch, best: Masks) -> None:
        """Answer with masks that are chosen already, and on their way to host memory."""
        row = 0
        for j, members in groupby(launch, lambda member: member[0]):
            rows = slice(row, row + len(list(members)))
            row = rows.stop
            self._by_job[j] = best[rows]

    def leave(self) -> None:
        """Have the device send all that was put, as soon as it is done with it."""
        missing = {job.candidates for j, job in enumerate(self._jobs) if j not in self._by_job}
        rooms = {candidates: self._room(candidates) for candidates in missing}
        if self._device.type == "cpu":
            self._left = {k: room.masks for k, room in rooms.items()}
            return
        self._left = {k: room.on_host() for k, room in rooms.items()}
        self._arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._arrival.record(torch.cuda.current_stream(self._device))

    def by_job(self) -> list[Masks]:
        """Each job's masks, in host memory: whoever asks is there."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return [self._of(j) for j in range(len(self._jobs))]

    def _of(self, j: int) -> Masks:
        if j in self._by_job:
            return self._by_job[j]
        job, first = self._jobs[j], self._first[j]
        return self._left[job.candidates][first : first + len(job.objects)]

    def _room(self, candidates: int) -> Room:
        if candidates not in self._rooms:
            side = self._jobs[0].features.high_res_feats_0.shape[-1]
            self._rooms[candidates] = Room(self._rows[candidates], candidates, side, self._device)
        return self._rooms[candidates]


def _asked(job: Job) -> tuple[bool, bool]:
    return job.multimask_output, job.best_only


def _choose(job: Job, logits: Tensor, ious: Tensor) -> tuple[Tensor, Tensor]:
    """What a job asked for of the program's four masks of each object (see export/decoder.py)."""
    if not job.multimask_output:
        return logits[:, :1], ious[:, :1]
    return best_of(logits, ious) if job.best_only else (logits[:, 1:], ious[:, 1:])


def best_of(logits: Tensor, ious: Tensor) -> tuple[Tensor, Tensor]:
    """Of each object's three candidates the one with the highest score: [R, 1, M, M], [R, 1]."""
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
