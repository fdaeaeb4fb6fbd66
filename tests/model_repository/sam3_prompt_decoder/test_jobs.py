"""Each job reads what it asked for, whatever shares its launches and however they are split."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from jobs import LOGIT_LIMIT, Answers, Job
from prompts import PADDING, POSITIVE, ObjectPrompt
from store import Features
from torch import Tensor

M = 4
CPU = torch.device("cpu")
IMAGE = Features(torch.zeros(1, 1, 1), torch.zeros(1, M, M), torch.zeros(1, 2, 2))
CLICK = ObjectPrompt(np.zeros((2, 2), np.float32), np.array([POSITIVE, PADDING], np.int32), None)


def job(objects: int, *, multimask_output: bool = True, best_only: bool = False) -> Job:
    return Job(IMAGE, [CLICK] * objects, multimask_output, best_only)


JOBS = [
    job(2),
    job(1, best_only=True),
    job(0),
    job(2, multimask_output=False),
    job(3, best_only=True),
    job(1),
]
OBJECTS = [(j, n) for j, one in enumerate(JOBS) for n in range(len(one.objects))]


def program(launch: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Masks and scores of four candidates that identify the job, the object and the candidate."""
    numbers = torch.tensor([[10.0 * j + n + c / 4 for c in range(4)] for j, n in launch])
    scores = torch.tensor([[(j + n + c) % 4 for c in range(4)] for j, n in launch]).float()
    return numbers[:, :, None, None].expand(-1, -1, M, M).clone() / 4, scores


@pytest.mark.parametrize("size", [1, 2, 4, len(OBJECTS)])
@pytest.mark.parametrize("order", ["as they are", "mixed"])
def test_a_job_gets_its_own_masks(size: int, order: str) -> None:
    rng = np.random.default_rng(0)
    kinds = rng.integers(3, size=len(OBJECTS)) if order == "mixed" else np.zeros(len(OBJECTS))
    answers = Answers(JOBS, CPU)
    for kind in range(3):
        group = [member for member, own in zip(OBJECTS, kinds, strict=True) if own == kind]
        for launch in (group[at : at + size] for at in range(0, len(group), size)):
            answers.put(launch, *program(launch))
    answers.copy_to_host()
    for j, (one, masks) in enumerate(zip(JOBS, answers.by_job(), strict=True)):
        assert masks.is_finite
        assert masks.low_res_masks.shape == (len(one.objects), one.candidates, M, M)
        assert masks.low_res_masks.dtype == torch.float16
        for n in range(len(one.objects)):
            logits, scores = (tensor[0] for tensor in program([(j, n)]))
            wanted = [0] if not one.multimask_output else [1, 2, 3]
            if one.multimask_output and one.best_only:
                wanted = [1 + int(scores[1:].argmax())]
            assert torch.equal(masks.low_res_masks[n], logits[wanted].half())
            assert torch.equal(masks.iou_predictions[n], scores[wanted])


def test_logits_are_clamped() -> None:
    values = torch.tensor([-1e9, torch.inf, -torch.inf, 1.0])
    answers = Answers([job(1)], CPU)
    answers.put([(0, 0)], values.view(1, 4, 1, 1).repeat(1, 1, M, M), torch.zeros(1, 4))
    answers.copy_to_host()
    (masks,) = answers.by_job()
    assert masks.is_finite
    assert masks.low_res_masks[0, :, 0, 0].tolist() == [LOGIT_LIMIT, -LOGIT_LIMIT, 1]


@pytest.mark.parametrize("what", ["a logit", "a score"])
def test_a_job_that_is_not_finite_does_not_affect_the_others(what: str) -> None:
    launch = [(0, 0), (1, 0), (1, 1)]
    logits, scores = program(launch)
    if what == "a logit":
        logits[1, 2, 3, 3] = torch.nan
    else:
        scores[1, 2] = torch.nan
    answers = Answers([job(1), job(2), job(1)], CPU)
    answers.put(launch, logits, scores)
    answers.put([(2, 0)], *program([(2, 0)]))
    answers.copy_to_host()
    assert [masks.is_finite for masks in answers.by_job()] == [True, False, True]


def test_no_jobs_give_no_answers() -> None:
    assert Answers([], CPU).by_job() == []
