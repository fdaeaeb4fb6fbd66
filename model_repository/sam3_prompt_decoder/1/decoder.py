"""Decodes the objects of many requests together: grouped by token count, in launches.

Attention in SAM's decoder runs over all tokens of an object, so objects can share a launch only
if they have the same number of tokens; padding them to one length would change their masks.
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
from launches import LaunchInputs
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

CPU_LAUNCH_IMAGE_TOKENS = 8192
"""Image tokens in one launch on a CPU: launches that outgrow the caches only run slower."""

GPU_LAUNCH_OBJECTS = 64

Request = TypeVar("Request")

REPLAYED_TOKENS = 16
"""Largest token count of a single-object click that is replayed."""

REPLAYED_OBJECTS, REPLAYED_OBJECTS_TOKENS = 8, 4
"""Largest object and token counts of merged clicks, from callers who click at the same time, that
are replayed."""

REPLAY_TOLERANCE = {"cpu": 1e-4, "cuda": 2e-3}
"""Largest relative error (L2) of replayed masks, by device. In FP32 another summation order costs a
fifth of it; another click, on random embeddings, costs twice as much with the demo model and 2,000
times as much at full size. In emulated TF32 another order costs 5e-4, because later rounding
amplifies the change: the tolerance then tells the demo model's images apart, but not its clicks."""


class Decoder:
    """`decoder.pt2` on one device. Raises `ProgramError` when it cannot be read."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.device = _with_index(device)
        if self.device.type == "cpu":
            # A trained model's attention is sharp: most of its weights are denormal numbers, which
            # processors multiply so slowly that they took a third of a decode. Threads inherit this
            # setting from the thread that starts them, so it comes before there are any.
            torch.set_flush_denormal(True)
        program = load_program(path, self.device)
        # Checks shapes against the traced ones until `prepare` replaces it.
        self._program: Program = program.module()
        self._unchecked = bind(program)
        self._workers: Workers | None = None
        if self.device.type == "cpu":
            self._workers = Workers()
            keep_freed_memory()
        else:
            torch.cuda.set_device(self.device)  # recording and DLPack use the current device
            # Matrix products in TF32: eight merged clicks take 2.3 ms instead of 3.3 (H200), with
            # masks within 1e-3 of FP32's, IoU 0.999 on random embeddings. Convolutions use TF32 by
            # default.
            torch.set_float32_matmul_precision("high")
            # A mask prompt is summed on the host: 0.13 ms on one thread, 1.7 ms if it wakes others.
            torch.set_num_threads(1)
        self._replays: list[ClickReplay] = []
        self._batch_size = 0 if self.device.type == "cpu" else REPLAYED_OBJECTS
        self.launches = 0
        """Number of runs of the program so far."""
        self.warning = ""
        """What an operator should know about this device."""

    def prepare(
        self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32
    ) -> None:
        """Check the program against the config's shapes, warm it up, and record clicks on a GPU.

        dtype: of the embeddings to come, FP32 or FP16. Later calls do not check shapes or type:
        Triton holds requests to the config. Raises `ProgramError` if program and config do not fit
        together.
        """
        try:
            self._check_shapes(shapes)
            if self.device.type == "cuda":
                self._record_replays(*(self._random_image(shapes, dtype) for _ in range(2)))
                self._decode_click(shapes)  # a failed recording may have broken the device
        except Exception as error:  # torch's guards and kernels share no exception
            if is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
                raise does_not_run(self.device, error) from error
            raise ProgramError(
                f"the decoder does not fit the shapes in config.pbtxt ({first_line(error)}); "
                "export both together"
            ) from error

    def _check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Decode a click with the program that checks shapes, then switch to the unchecked one."""
        self._decode_click(shapes)
        self._program = self._unchecked

    def _decode_click(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.decode([Job(self._random_image(shapes, torch.float32), [_click(0.5)])])

    def _random_image(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> Features:
        """Random embeddings, laid out in memory like a kept image."""
        tensors = (
            torch.randn(shapes[name], dtype=dtype, device=self.device) for name in Features._fields
        )
        return Features(*tensors).kept_copy()

    def _record_replays(self, image: Features, other: Features) -> None:
        """Record clicks and replay them from now on, if that gives the same masks as the program.

        Everything is recorded here so that no request waits for it. If merged clicks cannot be
        recorded, single clicks are still replayed.
        """
        side = image.high_res_feats_0.shape[-1]
        earlier = torch.zeros((side, side), dtype=torch.float16, device=self.device)
        errors = {
            "clicks": self._enable_replay(_clicks(image, earlier)),
            "merged clicks": self._enable_replay(_merged_clicks(image, other, earlier)),
        }
        self.warning = "; ".join(
            f"{what} are not replayed, which makes them slower: {error}"
            for what, error in errors.items()
            if error
        )

    def _enable_replay(self, clicks: Sequence[Sequence[Job]]) -> str:
        """Replay launches of these clicks' shapes from now on; return why not, or ''."""
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
        return replay.first_error

    @torch.inference_mode()
    def _record(self, clicks: Sequence[Sequence[Job]]) -> ClickReplay:
        replay = ClickReplay(self._program, self.device)
        for jobs in clicks:
            for launches in self._launches(jobs):
                for launch in launches:
                    replay.record(LaunchInputs.from_jobs(jobs, launch))
        return replay

    def split_batch(self, requests: Sequence[Request]) -> list[Sequence[Request]]:
        """Split requests into batches, each started before the next is parsed.

        A CPU gets all of them as one batch, which merges the most objects.
        """
        size = self._batch_size or max(1, len(requests))
        return [requests[start : start + size] for start in range(0, len(requests), size)]

    def decode(self, jobs: Sequence[Job]) -> list[Masks]:
        """Decode every object of every job.

        An object's mask does not depend on the other objects, except through the order in which a
        launch's sums are taken.
        """
        return self.start(jobs).by_job()

    @torch.inference_mode()
    def start(self, jobs: Sequence[Job]) -> Answers:
        """Like `decode`, but without waiting for a GPU: reading the answers waits."""
        answers = Answers(jobs, self.device)
        if self._workers is None:
            for launches in self._launches(jobs):
                for launch in launches:
                    self._launch(jobs, launch, answers)
        else:
            for launch, (logits, ious) in self._run_side_by_side(jobs, self._workers):
                answers.put(launch, logits, ious)
        answers.copy_to_host()
        return answers

    def _launch(self, jobs: Sequence[Job], launch: Launch, answers: Answers) -> None:
        """Replay or run a launch and store its masks."""
        self.launches += 1
        inputs = LaunchInputs.from_jobs(jobs, launch)
        recording = next((r for replay in self._replays if (r := replay.find(inputs))), None)
        logits, ious = (recording or self._run)(inputs)
        if recording and answers.wants_only_best(launch):
            answers.put_best(launch, recording.best())
        else:
            answers.put(launch, logits, ious)

    def _run_side_by_side(
        self, jobs: Sequence[Job], workers: Workers
    ) -> Iterator[tuple[Launch, tuple[Tensor, Tensor]]]:
        """Yield each launch with its masks, running several at a time on a CPU's cores.

        Only launches of the same token count run side by side: the number of cores that a launch
        gets shows in the last bit of a sum, which must not depend on objects of another kind.
        """
        for launches in self._launches(jobs):
            job, _ = launches[0][0]
            image_tokens = len(launches[0]) * _image_tokens(jobs[job].features)
            run = partial(self._run_launch, jobs)
            yield from zip(launches, workers.map(run, launches, image_tokens), strict=True)
            self.launches += len(launches)

    def _launches(self, jobs: Sequence[Job]) -> Iterator[list[Launch]]:
        """Yield the launches of each kind of object, in order."""
        groups: dict[tuple[int, bool], Launch] = defaultdict(list)
        for j, job in enumerate(jobs):
            for n, prompt in enumerate(job.objects):
                groups[self._kind(prompt)].append((j, n))
        for members in groups.values():
            size = self._launch_size(jobs[members[0][0]].features, len(members))
            yield [members[start : start + size] for start in range(0, len(members), size)]

    def _kind(self, prompt: ObjectPrompt) -> tuple[int, bool]:
        """What the objects of a launch have in common: the token count and, on a GPU, whether they
        refine a mask, since a replay has masks for all of its objects or for none.
        """
        return prompt.tokens, self._workers is None and prompt.mask is not None

    def _launch_size(self, features: Features, objects: int) -> int:
        if self._workers is None:
            return GPU_LAUNCH_OBJECTS
        limit = max(1, CPU_LAUNCH_IMAGE_TOKENS // _image_tokens(features))
        return min(limit, self._workers.launch_size(objects))

    def _run_launch(self, jobs: Sequence[Job], launch: Launch) -> tuple[Tensor, Tensor]:
        return self._run(LaunchInputs.from_jobs(jobs, launch))

    def _run(self, inputs: LaunchInputs) -> tuple[Tensor, Tensor]:
        return self._program(**inputs.tensors(self.device))


def _with_index(device: torch.device) -> torch.device:
    """A GPU with its index, as in its tensors' `device`: "cuda" alone does not compare equal."""
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _check_same(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Raise RuntimeError unless masks agree within the tolerance, all taken together.

    A replay may sum in a different order.
    """
    theirs = theirs.float()
    difference = float((ours.float() - theirs).norm() / theirs.norm())
    if not difference <= tolerance:  # also NaN
        raise RuntimeError(f"replayed masks differ by {difference:.1e} of their size")


def _image_tokens(features: Features) -> int:
    """Image tokens of one object."""
    return features.image_embed[0].numel()


def _click(position: float, points: int = 1, mask: Tensor | None = None) -> ObjectPrompt:
    """A click on the image's diagonal, at a fraction of both sides."""
    coords = np.array([[position, position]] * points + [[0, 0]], dtype=np.float32)
    labels = np.array([POSITIVE] * points + [PADDING], dtype=np.int32)
    return ObjectPrompt(coords, labels, mask)


def _clicks(image: Features, earlier: Tensor) -> list[list[Job]]:
    """One click of each single-object shape, with and without an earlier mask, and two at other
    positions, which the replay must follow.
    """
    mask_only = ObjectPrompt(np.empty((0, 2), np.float32), np.empty(0, np.int32), earlier)
    points = range(1, REPLAYED_TOKENS)
    shapes = [_click(0.5, count, mask) for count in points for mask in (None, earlier)]
    clicks = [mask_only, *shapes, _click(0.25), _click(0.75)]
    return [[Job(image, [click])] for click in clicks]


def _merged_clicks(image: Features, other: Features, earlier: Tensor) -> list[list[Job]]:
    """Clicks of several callers in each merged shape, and the first shape again in reverse order.

    The largest shape comes first: the others share its buffers.
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
