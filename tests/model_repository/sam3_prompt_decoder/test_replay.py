"""What is replayed and what is not, with a recording that a CPU can make; CUDA's: test_gpu.py."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest
from decoder import REPLAYED_OBJECTS, REPLAYED_OBJECTS_TOKENS, REPLAYED_TOKENS, Decoder
from jobs import Job
from program import Program
from torch import Tensor

from export.repository import DECODER, TEMPLATES, read_config
from tests.model_repository.sam3_prompt_decoder.test_decoder import CPU, close, features, prompt


class Recording:
    """As CUDA's, one that has its inputs and outputs in memory of its own."""

    replayed: ClassVar[Counter[int]] = Counter()
    """How often, by the number of objects."""

    def __init__(self, program: Program, inputs: dict[str, Tensor], _: Any) -> None:
        self._program, self._inputs = program, inputs
        self._outputs = program(**inputs)

    def __call__(self, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        Recording.replayed[len(inputs["point_labels"])] += 1
        for name, own in self._inputs.items():
            own.copy_(inputs[name])
        for own, fresh in zip(self._outputs, self._program(**self._inputs), strict=True):
            own.copy_(fresh)
        return self._outputs


class Refused(Recording):
    """CUDA does not record everything."""

    def __init__(self, program: Program, inputs: dict[str, Tensor], _: Any) -> None:
        if len(inputs["point_labels"]) > 1:
            raise RuntimeError("operation not permitted when stream is capturing")
        super().__init__(program, inputs, _)


class Forgetful(Recording):
    """Always answers the clicks it was made with."""

    def __call__(self, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        several = len(inputs["point_labels"]) > 1
        return self._outputs if several else super().__call__(**inputs)


def _decoder(program: Path) -> Decoder:
    """One whose launches are as on a GPU: one after the other, and not cut to the cores."""
    decoder = Decoder(program, CPU)
    decoder._workers = None
    return decoder


def _replay(decoder: Decoder, recording: type[Recording]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("replay._Recording", recording)
        decoder._replay_clicks(features(8).own(), features(9).own())
    Recording.replayed.clear()


@pytest.fixture(scope="module")
def plain(program: Path) -> Decoder:
    return _decoder(program)


@pytest.fixture(scope="module")
def recorded(program: Path) -> Decoder:
    decoder = _decoder(program)
    _replay(decoder, Recording)
    return decoder


@pytest.fixture
def replaying(recorded: Decoder) -> Decoder:
    Recording.replayed.clear()
    return recorded


def _jobs(objects: int, points: int, *, masks: bool = False) -> list[Job]:
    return [
        Job(features(n).own(), [prompt([1] * points, mask=n if masks else None, seed=n)])
        for n in range(objects)
    ]


SHAPES = [
    *[(1, REPLAYED_TOKENS - 1), (1, 1), (REPLAYED_OBJECTS, REPLAYED_OBJECTS_TOKENS - 1)],
    *[(REPLAYED_OBJECTS, 1), (2, 1), (3, 2)],
]


@pytest.mark.parametrize("masks", [False, True])
def test_clicks_are_replayed_and_each_gets_its_own(
    replaying: Decoder, plain: Decoder, masks: bool
) -> None:
    assert not replaying.remark
    for objects, points in [*SHAPES, *SHAPES[::-1]]:
        jobs = _jobs(objects, points, masks=masks)
        for ours, theirs in zip(replaying.decode(jobs), plain.decode(jobs), strict=True):
            close(ours.low_res_masks, theirs.low_res_masks)
            close(ours.iou_predictions, theirs.iou_predictions)
    wanted = Counter(objects for objects, _ in SHAPES)
    assert Recording.replayed == wanted + wanted


def test_as_many_are_replayed_as_triton_merges() -> None:
    assert read_config(TEMPLATES, DECODER).max_batch_size == REPLAYED_OBJECTS


def test_boxes_of_one_image_are_replayed_too(replaying: Decoder, plain: Decoder) -> None:
    job = Job(features(1).own(), [prompt([2, 3], seed=n) for n in range(4)])
    (ours,), (theirs,) = replaying.decode([job]), plain.decode([job])
    close(ours.low_res_masks, theirs.low_res_masks)
    assert Recording.replayed == {4: 1}


def test_first_clicks_and_those_that_refine_a_mask_are_replayed_apart(
    replaying: Decoder, plain: Decoder
) -> None:
    jobs = _jobs(3, 1) + _jobs(2, 1, masks=True)
    for ours, theirs in zip(replaying.decode(jobs), plain.decode(jobs), strict=True):
        close(ours.low_res_masks, theirs.low_res_masks)
    assert Recording.replayed == {2: 1, 3: 1}


@pytest.mark.parametrize(
    "shape",
    [(1, REPLAYED_TOKENS), (REPLAYED_OBJECTS + 1, 1), (2, REPLAYED_OBJECTS_TOKENS), (64, 1)],
)
def test_what_was_not_recorded_runs_as_it_is(
    replaying: Decoder, plain: Decoder, shape: tuple[int, int]
) -> None:
    for ours, theirs in zip(
        replaying.decode(_jobs(*shape)), plain.decode(_jobs(*shape)), strict=True
    ):
        close(ours.low_res_masks, theirs.low_res_masks)
    assert not Recording.replayed


@pytest.mark.parametrize(
    ("recording", "why"),
    [(Refused, "operation not permitted"), (Forgetful, "replayed masks differ by")],
)
def test_what_refuses_merged_clicks_leaves_the_others(
    program: Path, monkeypatch: pytest.MonkeyPatch, recording: type[Recording], why: str
) -> None:
    monkeypatch.setattr("decoder.REPLAYED_OBJECTS", 2)
    decoder = _decoder(program)
    _replay(decoder, recording)
    sentence = f"merged clicks are not replayed, which makes them slower: {why}"
    assert decoder.remark.startswith(sentence)
    decoder.decode(_jobs(2, 1))
    decoder.decode(_jobs(1, 1))
    assert Recording.replayed == {1: 1}
