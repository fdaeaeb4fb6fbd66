"""The decoder on a GPU: it gives the CPU's masks, and replayed clicks give the program's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from decoder import REPLAY_TOLERANCE, REPLAYED_OBJECTS, REPLAYED_TOKENS, Decoder, _check_same
from jobs import Job
from prompts import ObjectPrompt
from store import Features
from torch import Tensor

from tests.model_repository.sam3_prompt_decoder.test_decoder import (
    OBJECTS,
    SHAPES,
    features,
    prompt,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]

GPU = torch.device("cuda:0")


@pytest.fixture(scope="module")
def on_gpu(program: Path) -> Decoder:
    decoder = Decoder(program, GPU)
    decoder.prepare(SHAPES)
    return decoder


def _job(seed: int, objects: Sequence[ObjectPrompt], device: torch.device) -> Job:
    return Job(Features(*(tensor.to(device) for tensor in features(seed))), objects)


def same(ours: Tensor, theirs: Tensor) -> None:
    _check_same(ours, theirs, REPLAY_TOLERANCE["cuda"])


def test_masks_from_a_gpu_are_the_same_as_from_a_cpu(on_gpu: Decoder, decoder: Decoder) -> None:
    (ours,) = on_gpu.decode([_job(1, OBJECTS, GPU)])
    (theirs,) = decoder.decode([_job(1, OBJECTS, torch.device("cpu"))])
    assert ours.low_res_masks.is_pinned()  # TF32's last bits differ
    torch.testing.assert_close(ours.low_res_masks, theirs.low_res_masks, rtol=2e-2, atol=2e-2)


def test_replayed_clicks_do_not_affect_each_other(on_gpu: Decoder, program: Path) -> None:
    assert not on_gpu.warning
    assert len(on_gpu._replays) == 2
    plain = Decoder(program, GPU)
    clicks = [(1, prompt([1])), (2, prompt([1], seed=1)), (1, prompt([1], mask=1))]
    clicks += [(3, prompt([1] * count)) for count in (3, REPLAYED_TOKENS - 1, REPLAYED_TOKENS)]
    for seed, click in [*clicks, *clicks]:
        (ours,) = on_gpu.decode([_job(seed, [click], GPU)])
        (theirs,) = plain.decode([_job(seed, [click], GPU)])
        same(ours.low_res_masks, theirs.low_res_masks)
        same(ours.iou_predictions, theirs.iou_predictions)


def test_merged_clicks_are_replayed_and_each_gets_its_own_mask(
    on_gpu: Decoder, program: Path
) -> None:
    plain = Decoder(program, GPU)
    kinds = ([1], [1, 0], [2, 3])
    for count in (REPLAYED_OBJECTS, 3, 2, REPLAYED_OBJECTS, REPLAYED_OBJECTS + 1):
        jobs = [
            _job(n % 3, [prompt(kinds[n % 3], mask=n if count == 3 else None, seed=n)], GPU)
            for n in range(count)
        ]
        for ours, theirs in zip(on_gpu.decode(jobs), plain.decode(jobs), strict=True):
            same(ours.low_res_masks, theirs.low_res_masks)
            same(ours.iou_predictions, theirs.iou_predictions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_best_masks_of_concurrent_batches_are_not_mixed_up(
    program: Path, dtype: torch.dtype
) -> None:
    """As the model does it: the next batch is started before the previous one has been read."""
    replaying, plain = Decoder(program, GPU), Decoder(program, GPU)
    replaying.prepare(SHAPES, dtype)
    assert not replaying.warning
    images = [
        Features(*(t.to(GPU, dtype) for t in features(seed))).kept_copy()
        for seed in range(2 * REPLAYED_OBJECTS)
    ]
    parts = [
        [Job(image, [prompt([1], seed=n)], best_only=True) for n, image in enumerate(part)]
        for part in (images[:REPLAYED_OBJECTS], images[REPLAYED_OBJECTS:], images[:3], images[:1])
    ]
    started = [replaying.start(part) for part in (*parts, *parts)]
    for part, answers in zip((*parts, *parts), started, strict=True):
        for ours, theirs in zip(answers.by_job(), plain.decode(part), strict=True):
            same(ours.low_res_masks, theirs.low_res_masks)
            same(ours.iou_predictions, theirs.iou_predictions)
            assert ours.is_finite


def test_the_host_does_not_wait_for_masks_that_are_refined(on_gpu: Decoder) -> None:
    """Otherwise the next batch would be parsed only after this one is decoded."""
    jobs = [_job(0, [prompt([1], mask=n, seed=n)], GPU) for n in range(REPLAYED_OBJECTS)]
    on_gpu.decode(jobs)
    torch.cuda._sleep(10**9)  # type: ignore[no-untyped-call]  # cycles, half a second
    answers = on_gpu.start(jobs)
    assert not torch.cuda.current_stream().query()
    assert all(masks.is_finite for masks in answers.by_job())
