"""What is replayed and what is not, with recordings on a CPU; for CUDA see test_gpu.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder import REPLAYED_OBJECTS, REPLAYED_OBJECTS_TOKENS, REPLAYED_TOKENS, Decoder
from jobs import Job, Masks
from store import Features
from torch import Tensor

from export.repository import DECODER, TEMPLATES, read_config
from tests.model_repository.sam3_prompt_decoder.graph import Graph
from tests.model_repository.sam3_prompt_decoder.test_decoder import CPU, close, features, prompt

Outputs = tuple[Tensor, Tensor]
Record = Callable[[Callable[[], Outputs], Any, Any], tuple[Outputs, Callable[[], None]]]

REPLAYED: Counter[int] = Counter()
"""Number of replays, by the number of objects."""


def record(run: Callable[[], Outputs], *_: Any) -> tuple[Outputs, Callable[[], None]]:
    """Like a CUDA graph: kernels on addresses, whoever owns the memory by then."""
    with Graph() as graph:
        outputs = run()

    def replay() -> None:
        REPLAYED[len(outputs[0])] += 1
        graph.replay()

    return outputs, replay


def refuse(run: Callable[[], Outputs], *_: Any) -> tuple[Outputs, Callable[[], None]]:
    """CUDA does not record everything."""
    outputs, replay = record(run)
    if len(outputs[0]) > 1:
        raise RuntimeError("operation not permitted when stream is capturing")
    return outputs, replay


def forget(run: Callable[[], Outputs], *_: Any) -> tuple[Outputs, Callable[[], None]]:
    """Several objects always get the answers that were recorded."""
    outputs, replay = record(run)
    return outputs, (lambda: None) if len(outputs[0]) > 1 else replay


def _decoder(program: Path) -> Decoder:
    """A decoder with launches as on a GPU: one after the other, and not split among the cores."""
    decoder = Decoder(program, CPU)
    decoder._workers = None
    decoder._program = decoder._unchecked
    return decoder


def _replay(decoder: Decoder, by: Record) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("replay._record", by)
        decoder._record_replays(features(8).kept_copy(), features(9).kept_copy())
    REPLAYED.clear()


@pytest.fixture(scope="module")
def plain(program: Path) -> Decoder:
    return _decoder(program)


@pytest.fixture(scope="module")
def recorded(program: Path) -> Decoder:
    decoder = _decoder(program)
    _replay(decoder, record)
    return decoder


@pytest.fixture
def replaying(recorded: Decoder) -> Decoder:
    REPLAYED.clear()
    return recorded


def _jobs(objects: int, points: int, *, masks: bool = False) -> list[Job]:
    return [
        Job(features(n).kept_copy(), [prompt([1] * points, mask=n if masks else None, seed=n)])
        for n in range(objects)
    ]


SHAPES = [
    *[(1, REPLAYED_TOKENS - 1), (1, 1), (REPLAYED_OBJECTS, REPLAYED_OBJECTS_TOKENS - 1)],
    *[(REPLAYED_OBJECTS, 1), (2, 1), (3, 2)],
]


@pytest.mark.parametrize("masks", [False, True])
def test_clicks_are_replayed_and_each_gets_its_own_mask(
    replaying: Decoder, plain: Decoder, masks: bool
) -> None:
    assert not replaying.warning
    for objects, points in [*SHAPES, *SHAPES[::-1]]:
        jobs = _jobs(objects, points, masks=masks)
        for ours, theirs in zip(replaying.decode(jobs), plain.decode(jobs), strict=True):
            close(ours.low_res_masks, theirs.low_res_masks)
            close(ours.iou_predictions, theirs.iou_predictions)
    wanted = Counter(objects for objects, _ in SHAPES)
    assert wanted + wanted == REPLAYED


@pytest.mark.parametrize("masks", [False, True])
def test_best_masks_are_replayed(
    replaying: Decoder, plain: Decoder, masks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is chosen after the replay, for jobs of one object or of several."""
    jobs = [replace(job, best_only=True) for job in _jobs(3, 1, masks=masks)]
    pair = Job(
        features(5).kept_copy(), [prompt([1], mask=n if masks else None, seed=n) for n in (6, 7)]
    )
    jobs = [*jobs[:2], replace(pair, best_only=True), jobs[2]]
    expected = plain.decode(jobs)
    with monkeypatch.context() as patch:
        patch.setattr("jobs._choose", None)
        answers = [replaying.start(jobs), replaying.start(jobs[::-1])]
    for found in (answers[0].by_job(), answers[1].by_job()[::-1]):
        for ours, theirs in zip(found, expected, strict=True):
            close(ours.low_res_masks, theirs.low_res_masks)
            close(ours.iou_predictions, theirs.iou_predictions)
            assert ours.is_finite
    assert REPLAYED == {5: 2}


def test_a_job_of_two_kinds_of_objects_gets_its_best_masks_too(
    replaying: Decoder, plain: Decoder
) -> None:
    both = [prompt([1]), prompt([2, 3]), prompt([1], seed=1)]
    jobs = [Job(features(1).kept_copy(), both, best_only=True), *_jobs(1, 1)]
    for ours, theirs in zip(replaying.decode(jobs), plain.decode(jobs), strict=True):
        close(ours.low_res_masks, theirs.low_res_masks)
        close(ours.iou_predictions, theirs.iou_predictions)
    assert REPLAYED == {3: 1, 1: 1}


def test_half_precision_embeddings_are_replayed_without_conversion(
    program: Path, plain: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("decoder.REPLAYED_OBJECTS", 2)
    monkeypatch.setattr("replay._record", record)
    decoder = _decoder(program)
    halved = [Features(*(t.half() for t in features(n))).kept_copy() for n in range(4)]
    decoder._record_replays(*halved[2:])
    assert not decoder.warning
    REPLAYED.clear()
    jobs = [Job(image, [prompt([1], seed=n)]) for n, image in enumerate(halved)]
    for together in (jobs[:2], jobs[:1]):
        for ours, theirs in zip(decoder.decode(together), plain.decode(together), strict=True):
            close(ours.low_res_masks, theirs.low_res_masks)
    assert REPLAYED == {2: 1, 1: 1}


def test_embeddings_of_another_type_run_without_replay(replaying: Decoder, plain: Decoder) -> None:
    (job,) = _jobs(1, 1)
    half = replace(job, features=Features(*(t.half() for t in job.features)))
    (ours,), (theirs,) = replaying.decode([half]), plain.decode([half])
    close(ours.low_res_masks, theirs.low_res_masks)
    assert not REPLAYED


def test_triton_merges_twice_as_many_as_are_replayed() -> None:
    """So that one half is parsed while the other is decoded."""
    assert read_config(TEMPLATES, DECODER).max_batch_size == 2 * REPLAYED_OBJECTS


def test_boxes_of_one_image_are_replayed_too(replaying: Decoder, plain: Decoder) -> None:
    job = Job(features(1).kept_copy(), [prompt([2, 3], seed=n) for n in range(4)])
    (ours,), (theirs,) = replaying.decode([job]), plain.decode([job])
    close(ours.low_res_masks, theirs.low_res_masks)
    assert REPLAYED == {4: 1}


def test_first_clicks_and_refining_clicks_are_replayed_separately(
    replaying: Decoder, plain: Decoder
) -> None:
    jobs = _jobs(3, 1) + _jobs(2, 1, masks=True)
    for ours, theirs in zip(replaying.decode(jobs), plain.decode(jobs), strict=True):
        close(ours.low_res_masks, theirs.low_res_masks)
    assert REPLAYED == {2: 1, 3: 1}


@pytest.mark.parametrize(
    "shape",
    [(1, REPLAYED_TOKENS), (REPLAYED_OBJECTS + 1, 1), (2, REPLAYED_OBJECTS_TOKENS), (64, 1)],
)
def test_shapes_that_were_not_recorded_run_without_replay(
    replaying: Decoder, plain: Decoder, shape: tuple[int, int]
) -> None:
    for ours, theirs in zip(
        replaying.decode(_jobs(*shape)), plain.decode(_jobs(*shape)), strict=True
    ):
        close(ours.low_res_masks, theirs.low_res_masks)
    assert not REPLAYED


@pytest.mark.parametrize(
    ("by", "why"),
    [(refuse, "operation not permitted"), (forget, "replayed masks differ by")],
)
def test_a_failed_recording_of_merged_clicks_keeps_single_clicks(
    program: Path, plain: Decoder, monkeypatch: pytest.MonkeyPatch, by: Record, why: str
) -> None:
    monkeypatch.setattr("decoder.REPLAYED_OBJECTS", 2)
    decoder = _decoder(program)
    _replay(decoder, by)
    sentence = f"merged clicks are not replayed, which makes them slower: {why}"
    assert decoder.warning.startswith(sentence)
    for jobs in (_jobs(2, 1), _jobs(1, 1)):
        for ours, theirs in zip(decoder.decode(jobs), plain.decode(jobs), strict=True):
            close(ours.low_res_masks, theirs.low_res_masks)
    assert REPLAYED == {1: 1}


def test_no_memory_for_merged_clicks_keeps_single_clicks(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder still loads."""
    monkeypatch.setattr("decoder.REPLAYED_OBJECTS", 2)
    decoder = _decoder(program)
    decode = decoder.decode

    def only_one(jobs: Sequence[Job]) -> list[Masks]:
        if len(jobs) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 170.00 MiB")
        return decode(jobs)

    monkeypatch.setattr(decoder, "decode", only_one)
    _replay(decoder, record)
    assert decoder.warning.startswith(
        "merged clicks are not replayed, which makes them slower: CUDA"
    )
    decoder.decode(_jobs(1, 1))
    assert REPLAYED == {1: 1}
