"""Objects of many requests, decoded together: grouped by token count, launched, handed back.

Attention in SAM's decoder runs over all tokens of an object, so objects can share a launch only
when they have equally many; padding them to one length would change their masks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jobs import Answers, Job, Launch, Masks
from launches import Inputs
from memory import keep_freed_memory
from program import (
    Program,
    ProgramError,
    bind,
    does_not_run,
    first_line,
    is_out_of_memory,
    load_program,
)
from prompts import PADDING, POSITIVE, ObjectPrompt
from replay import ClickReplay
from store import Features
from torch import Tensor
from workers import Workers

CPU_LAUNCH_ROWS = 8192
"""Image tokens in one launch on a CPU: beyond the caches, larger launches only run slower."""

GPU_LAUNCH_OBJECTS = 64

Request = TypeVar("Request")

REPLAYED_TOKENS = 16
"""Of one object, replayed by itself."""

REPLAYED_OBJECTS, REPLAYED_OBJECTS_TOKENS = 8, 4
"""Replayed together, of callers who click at the same time."""

REPLAY_TOLERANCE = {"cpu": 1e-4, "cuda": 2e-3}
"""Of the masks' size (L2), by device. In FP32 sums in another order cost a fifth of it; another
click, on random embeddings, twice as much with the demo model and 2,000 times at full size. In
TF32, emulated, another order costs 5e-4, as what it changes rounds elsewhere: there the demo
model's clicks are not told from each other, its images are."""


class Decoder:
    """`decoder.pt2` on one device. Raises `ProgramError` when it cannot be read."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.device = _numbered(device)
        if self.device.type == "cpu":
            # A trained model's attention is sharp: most of its weights are too small for a normal
            # number, which processors multiply so slowly that they took a third of a decode.
            # A thread has this from the one that starts it, so it comes before there are any.
            torch.set_flush_denormal(True)
        program = load_program(path, self.device)
        # At first the one that compares shapes with the traced ones; see `check`.
        self._program: Program = program.module()
        self._unchecked = bind(program)
        self._workers: Workers | None = None
        if self.device.type == "cpu":
            self._workers = Workers()
            keep_freed_memory()
        else:
            torch.cuda.set_device(self.device)  # recording and DLPack take the current one
            # Matrix products in TF32: eight merged clicks in 2.3 ms for 3.3 (H200), masks within
            # 1e-3 of FP32's, IoU 0.999 on random embeddings. Convolutions have it by default.
            torch.set_float32_matmul_precision("high")
            # A mask prompt's sum, on the host: waking others for it took 1.7 ms, on one 0.13.
            torch.set_num_threads(1)
        self._replays: list[ClickReplay] = []
        self._part = 0 if self.device.type == "cpu" else REPLAYED_OBJECTS
        self.launches = 0
        """How often the program has run."""
        self.remark = ""
        """What an operator should know of this device."""

    def check(
        self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32
    ) -> None:
        """Decode one click on embeddings of the config's shapes, which warms up the program too.

        dtype: the embeddings' as they will come, FP32 or FP16. Later calls leave shapes and type to
        Triton, which holds requests to the config. Raises `ProgramError` when program and config do
        not fit together.
        """
        try:
            self._decode_a_click(shapes)
            self._program = self._unchecked
            if self.device.type == "cuda":
                self._replay_clicks(*(self._random_image(shapes, dtype) for _ in range(2)))
                self._decode_a_click(shapes)  # a recording that failed may have broken the device
        except Exception as error:  # torch's guards and kernels share no exception
            if is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
                raise does_not_run(self.device, error) from error
            raise ProgramError(
                f"the decoder does not fit the shapes in config.pbtxt ({first_line(error)}); "
                "export both together"
            ) from error

    def _decode_a_click(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.decode([Job(self._random_image(shapes, torch.float32), [_click(0.5)])])

    def _random_image(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> Features:
        """As a click finds it."""
        made = (
            torch.randn(shapes[name], dtype=dtype, device=self.device) for name in Features._fields
        )
        return Features(*made).own()

    def _replay_clicks(self, image: Features, other: Features) -> None:
        """Replay clicks from now on, if that gives the masks that the program gives.

        All of them are recorded here, so that nobody waits for it. What refuses those that are
        merged leaves those that come by themselves.
        """
        side = image.high_res_feats_0.shape[-1]
        earlier = torch.zeros((side, side), dtype=torch.float16, device=self.device)
        refusals = {
            "clicks": self._replay(_clicks(image, earlier)),
            "merged clicks": self._replay(_merged_clicks(image, other, earlier)),
        }
        self.remark = "; ".join(
            f"{what} are not replayed, which makes them slower: {why}"
            for what, why in refusals.items()
            if why
        )

    def _replay(self, clicks: Sequence[Sequence[Job]]) -> str:
        """Replay from now on what has these shapes; say why not, where that is so."""
        before = list(self._replays)
        tolerance = REPLAY_TOLERANCE[self.device.type]
        try:
            expected = [self.decode(jobs) for jobs in clicks]
            replay = self._record(clicks)
            self._replays.append(replay)
            for jobs, answers in zip(clicks, expected, strict=True):
                best = self.decode([replace(job, best_only=True) for job in jobs])
                for ours, theirs, chosen in zip(self.decode(jobs), answers, best, strict=True):
                    _check_same(ours.low_res_masks, theirs.low_res_masks, tolerance)
                    highest = ours.iou_predictions.argmax(1)
                    ours_best = ours.low_res_masks[torch.arange(len(highest)), highest]
                    _check_same(chosen.low_res_masks.squeeze(1), ours_best, tolerance)
        except RuntimeError as error:
            self._replays = before
            return first_line(error)
        return replay.refusal

    @torch.inference_mode()
    def _record(self, clicks: Sequence[Sequence[Job]]) -> ClickReplay:
        replay = ClickReplay(self._program, self.device)
        for jobs in clicks:
            for launches in self._launches(jobs):
                for launch in launches:
                    replay.record(Inputs.of(jobs, launch))
        return replay

    def parts(self, requests: Sequence[Request]) -> list[Sequence[Request]]:
        """What to start before the next is read; on a CPU all, so that most objects are merged."""
        size = self._part or max(1, len(requests))
        return [requests[start : start + size] for start in range(0, len(requests), size)]

    def decode(self, jobs: Sequence[Job]) -> list[Masks]:
        """Decode every object of every job.

        An object's mask does not depend on its company, but for the order of a launch's sums.
        """
        return self.start(jobs).by_job()

    @torch.inference_mode()
    def start(self, jobs: Sequence[Job]) -> Answers:
        """The same, without waiting for a GPU: its answers wait when they are read."""
        answers = Answers(jobs, self.device)
        if self._workers is None:
            for launches in self._launches(jobs):
                for launch in launches:
                    self._launch(jobs, launch, answers)
        else:
            for launch, (logits, ious) in self._run_side_by_side(jobs, self._workers):
                answers.put(launch, logits, ious)
        answers.leave()
        return answers

    def _launch(self, jobs: Sequence[Job], launch: Launch, answers: Answers) -> None:
        """Replay a launch or run it, and put what it makes."""
        self.launches += 1
        inputs = Inputs.of(jobs, launch)
        recording = next((r for replay in self._replays if (r := replay.find(inputs))), None)
        logits, ious = (recording or self._run)(inputs)
        if recording and answers.are_best_of(launch):
            answers.put_best(launch, recording.best())
        else:
            answers.put(launch, logits, ious)

    def _run_side_by_side(
        self, jobs: Sequence[Job], workers: Workers
    ) -> Iterator[tuple[Launch, tuple[Tensor, Tensor]]]:
        """Each launch with its masks, several at a time on a CPU's cores.

        Only those of the same token count: how many cores a launch has shows in a sum's last bit,
        which is not to depend on objects that are none of the launch's own kind.
        """
        for launches in self._launches(jobs):
            job, _ = launches[0][0]
            rows = len(launches[0]) * _rows(jobs[job].features)
            run = partial(self._run_on_a_core, jobs)
            yield from zip(launches, workers.map(run, launches, rows), strict=True)
            self.launches += len(launches)

    def _launches(self, jobs: Sequence[Job]) -> Iterator[list[Launch]]:
        """Yield, for each kind of object, its launches, in order."""
        groups: dict[tuple[int, bool], Launch] = defaultdict(list)
        for j, job in enumerate(jobs):
            for n, prompt in enumerate(job.objects):
                groups[self._kind(prompt)].append((j, n))
        for members in groups.values():
            size = self._launch_size(jobs[members[0][0]].features, len(members))
            yield [members[start : start + size] for start in range(0, len(members), size)]

    def _kind(self, prompt: ObjectPrompt) -> tuple[int, bool]:
        """What the objects of a launch have in common: the token count, and on a GPU whether they
        refine a mask, since what is replayed has masks of all or of none.
        """
        return prompt.tokens, self._workers is None and prompt.mask is not None

    def _launch_size(self, features: Features, objects: int) -> int:
        if self._workers is None:
            return GPU_LAUNCH_OBJECTS
        most = max(1, CPU_LAUNCH_ROWS // _rows(features))
        return min(most, self._workers.share(objects))

    def _run_on_a_core(self, jobs: Sequence[Job], launch: Launch) -> tuple[Tensor, Tensor]:
        return self._run(Inputs.of(jobs, launch))

    def _run(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        return self._program(**inputs.tensors(self.device))


def _numbered(device: torch.device) -> torch.device:
    """A GPU with its number, as its tensors name it: nothing else is equal to their device."""
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _check_same(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """By their difference as a whole: what is replayed may choose another order for its sums.

    Raises RuntimeError.
    """
    theirs = theirs.float()
    difference = float((ours.float() - theirs).norm() / theirs.norm())
    if not difference <= tolerance:  # also NaN
        raise RuntimeError(f"replayed masks differ by {difference:.1e} of their size")


def _rows(features: Features) -> int:
    """Image tokens of one object."""
    return features.image_embed[0].numel()


def _click(place: float, points: int = 1, mask: Tensor | None = None) -> ObjectPrompt:
    """On the diagonal, at a fraction of both sides."""
    coords = np.array([[place, place]] * points + [[0, 0]], dtype=np.float32)
    labels = np.array([POSITIVE] * points + [PADDING], dtype=np.int32)
    return ObjectPrompt(coords, labels, mask)


def _clicks(image: Features, earlier: Tensor) -> list[list[Job]]:
    """One of each shape that comes by itself, with an earlier mask and without; and two elsewhere,
    which what was recorded is to follow.
    """
    mask_only = ObjectPrompt(np.empty((0, 2), np.float32), np.empty(0, np.int32), earlier)
    points = range(1, REPLAYED_TOKENS)
    shapes = [_click(0.5, count, mask) for count in points for mask in (None, earlier)]
    clicks = [mask_only, *shapes, _click(0.25), _click(0.75)]
    return [[Job(image, [click])] for click in clicks]


def _merged_clicks(image: Features, other: Features, earlier: Tensor) -> list[list[Job]]:
    """Clicks of several callers in each shape, the most first, whose room the others use too;
    and once more in another order.
    """
    merged = [
        [
            Job((image, other)[n % 2], [_click((n + 1) / (objects + 1), points, mask)])
            for n in range(objects)
        ]
        for objects in range(REPLAYED_OBJECTS, 1, -1)
        for points in range(1, REPLAYED_OBJECTS_TOKENS)
        for mask in (None, earlier)
    ]
    return [*merged, merged[0][::-1]]
