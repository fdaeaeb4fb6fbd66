"""Objects decoded together get the same masks as alone, and as Meta's predictor gives."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import decoder as reader
import numpy as np
import pytest
import torch
from decoder import REPLAY_TOLERANCE, Decoder, _check_same
from jobs import LOGIT_LIMIT, Job, Masks
from numpy.typing import NDArray
from program import ProgramError, load_program
from prompts import Limits, ObjectPrompt, parse_prompts
from store import Features, ImageStore
from torch import Tensor
from torch.export import ExportedProgram

from tests.export import tiny

CPU = torch.device("cpu")
M = tiny.ARCHITECTURE.mask_size
LIMITS = Limits(max_objects=64, max_tokens=16, mask_size=M)
SHAPES = {
    "image_embed": (64, 8, 8),
    "high_res_feats_0": (8, 32, 32),
    "high_res_feats_1": (16, 16, 16),
}


def features(seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    return Features(*(torch.randn(shape, generator=generator) for shape in SHAPES.values()))


def prompt(labels: Sequence[int], mask: int | None = None, seed: int = 0) -> ObjectPrompt:
    """One object with random coordinates and, if a seed for it is given, a random mask."""
    rng = np.random.default_rng((seed, *(label + 1 for label in labels)))
    coords = rng.random((1, len(labels), 2), dtype=np.float32)
    corners = [p for p, label in enumerate(labels) if label in (2, 3)]
    coords[0, corners] = np.sort(coords[0, corners], axis=0)
    masks = None
    if mask is not None:
        masks = torch.randn(1, M, M, generator=torch.Generator().manual_seed(mask)) * 5
    (parsed,) = parse_prompts(coords, np.array([labels], np.int32), masks, LIMITS)
    return parsed


OBJECTS = (
    prompt([1]),
    prompt([1], seed=1),
    prompt([1], mask=1),
    prompt([1, 0, 0]),
    prompt([2, 3]),
    prompt([2, 3, 1], mask=2),
    prompt([], mask=3),
    prompt([], mask=4),
)
"""Token counts 2, 4, 3, 0; with masks and without."""


def alone(decoder: Decoder, job: Job, n: int) -> Masks:
    (answer,) = decoder.decode([replace(job, objects=[job.objects[n]])])
    return answer


def close(ours: Tensor, theirs: Tensor) -> None:
    """Equal except for FP16's last bit and the order of sums, which depends on a launch's size."""
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-4)


@pytest.mark.semantic("masks", "an object's mask does not depend on what else is asked", "equality")
@pytest.mark.parametrize("order", ["as they are", "reversed", "shuffled"])
def test_an_objects_mask_does_not_depend_on_other_objects(decoder: Decoder, order: str) -> None:
    """Not on other objects, on their tokens, masks and images, or on the order."""
    indices = list(range(len(OBJECTS)))
    if order == "reversed":
        indices.reverse()
    if order == "shuffled":
        np.random.default_rng(0).shuffle(indices)
    jobs = [
        Job(features(1), [OBJECTS[i] for i in indices]),
        Job(features(2).kept_copy(), [OBJECTS[i] for i in indices[:3]]),
        Job(features(1), []),
        Job(features(3), [OBJECTS[i] for i in indices[4:]]),
    ]
    for job, together in zip(jobs, decoder.decode(jobs), strict=True):
        for n in range(len(job.objects)):
            single = alone(decoder, job, n)
            close(together.low_res_masks[n : n + 1], single.low_res_masks)
            close(together.iou_predictions[n : n + 1], single.iou_predictions)


@pytest.mark.semantic("session", "a kept image gives the masks of the image sent", "equality")
def test_an_image_that_is_kept_gives_the_same_masks(decoder: Decoder) -> None:
    store = ImageStore(max_bytes=2**20, max_idle_seconds=60)
    image = store.get(store.keep(features(1)))
    sent, kept = (decoder.decode([Job(found, OBJECTS)]) for found in (features(1), image))
    assert torch.equal(sent[0].low_res_masks, kept[0].low_res_masks)
    assert torch.equal(sent[0].iou_predictions, kept[0].iou_predictions)


def test_different_objects_have_different_masks(decoder: Decoder) -> None:
    """Otherwise the test above would prove nothing."""
    (answer,) = decoder.decode([Job(features(1), OBJECTS)])
    (other,) = decoder.decode([Job(features(2), OBJECTS)])
    flat = answer.low_res_masks.float().flatten(1)
    distances = torch.cdist(flat, flat) + torch.eye(len(flat)) * 1e9
    assert distances.min() > 1e-2
    differences = (flat - other.low_res_masks.float().flatten(1)).norm(dim=1)
    assert differences.min() > 1e-2


def test_shared_embeddings_are_as_good_as_copies(decoder: Decoder) -> None:
    shared = features(1)
    copies = [Job(Features(*(t.clone() for t in shared)), [o]) for o in OBJECTS]
    (together,) = decoder.decode([Job(shared, OBJECTS)])
    apart = decoder.decode(copies)
    for n, answer in enumerate(apart):
        close(together.low_res_masks[n], answer.low_res_masks[0])


def test_half_precision_embeddings_are_decoded_in_fp32(decoder: Decoder) -> None:
    half = Features(*(t.half() for t in features(1)))
    single = Features(*(t.float() for t in half))
    for jobs in ([half], [half, Features(*(t.clone() for t in half))]):
        answers = decoder.decode([Job(f, OBJECTS) for f in jobs])
        (expected,) = decoder.decode([Job(single, OBJECTS)])
        close(answers[0].low_res_masks, expected.low_res_masks)
        assert answers[0].iou_predictions.dtype == torch.float32


def test_large_requests_are_split_into_launches(decoder: Decoder) -> None:
    many = [prompt([1], seed=i) for i in range(300)]
    before = decoder.launches
    (answer,) = decoder.decode([Job(features(1), many)])
    assert 1 < decoder.launches - before < 300
    for n in (0, 150, 299):
        close(answer.low_res_masks[n], alone(decoder, Job(features(1), many), n).low_res_masks[0])


def test_launches_side_by_side_give_the_same_masks(decoder: Decoder, program: Path) -> None:
    torch.set_num_threads(2)  # until this module's fixture resets it
    try:
        two = Decoder(program, torch.device("cpu"))
        many = [prompt([1, 0][: 1 + i % 2], seed=i) for i in range(24)]
        jobs = [Job(features(i), many[i:]) for i in range(3)]
        answers = two.decode(jobs)
        assert two.launches == 2 * 2  # one half of each token count
    finally:
        torch.set_num_threads(1)
    for ours, theirs in zip(answers, decoder.decode(jobs), strict=True):
        close(ours.low_res_masks, theirs.low_res_masks)
        close(ours.iou_predictions, theirs.iou_predictions)


def test_one_launch_for_each_token_count(decoder: Decoder) -> None:
    before = decoder.launches
    decoder.decode([Job(features(i), OBJECTS) for i in range(4)])
    assert decoder.launches - before == len({o.tokens for o in OBJECTS})
    decoder.decode([])
    decoder.decode([Job(features(1), [])])
    assert decoder.launches - before == len({o.tokens for o in OBJECTS})


@pytest.mark.parametrize(
    ("multimask", "best", "k"),
    [(True, False, 3), (True, True, 1), (False, False, 1), (False, True, 1)],
)
def test_shapes_and_types(decoder: Decoder, multimask: bool, best: bool, k: int) -> None:
    for objects in ((), OBJECTS[:1], OBJECTS):
        (answer,) = decoder.decode([Job(features(1), objects, multimask, best)])
        assert answer.low_res_masks.shape == (len(objects), k, M, M)
        assert answer.iou_predictions.shape == (len(objects), k)
        assert answer.low_res_masks.dtype == torch.float16
        assert answer.iou_predictions.dtype == torch.float32
        assert not objects or answer.low_res_masks.abs().max() <= LOGIT_LIMIT


@pytest.mark.semantic(
    "masks", "`best_only` is the candidate of the highest predicted IoU", "the contract"
)
def test_best_only_is_the_candidate_of_the_highest_score(decoder: Decoder) -> None:
    clicks = [prompt([1, 0], mask=1, seed=n) for n in range(24)]
    jobs = [Job(features(1), clicks), Job(features(1), clicks, best_only=True)]
    every, best = decoder.decode(jobs)
    chosen = every.iou_predictions.argmax(1)
    assert len(set(chosen.tolist())) > 1
    for n, k in enumerate(chosen):
        assert torch.equal(best.low_res_masks[n, 0], every.low_res_masks[n, k])
        assert best.iou_predictions[n, 0] == every.iou_predictions[n, k]


def test_a_program_of_other_sizes_is_rejected(decoder: Decoder) -> None:
    decoder.prepare(SHAPES)
    with pytest.raises(ProgramError, match=r"does not fit the shapes in config.pbtxt .*; export"):
        decoder.prepare({**SHAPES, "image_embed": (64, 9, 9)})


NO_ROOM = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 170.00 MiB"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
]
"""In torch's words."""


@pytest.mark.parametrize("error", NO_ROOM, ids=str)
def test_a_full_device_is_not_reported_as_a_wrong_export(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def decode(_: Sequence[Job]) -> list[Masks]:
        raise error

    monkeypatch.setattr(decoder, "decode", decode)
    with pytest.raises(ProgramError) as refused:
        decoder.prepare(SHAPES)
    assert str(refused.value).startswith(f"the decoder does not run on cpu ({error}); check what")


def test_a_device_broken_by_a_recording_is_not_reported_as_ready(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA context repeats an error once met for every later call."""
    broken: list[Features] = []

    def decode(_: Sequence[Job]) -> list[Masks]:
        if broken:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return []

    monkeypatch.setattr(decoder, "device", torch.device("cuda:0"))
    monkeypatch.setattr(decoder, "_random_image", lambda *_: features(1))
    monkeypatch.setattr(decoder, "_record_replays", lambda *images: broken.extend(images))
    monkeypatch.setattr(decoder, "decode", decode)
    with pytest.raises(ProgramError, match=r"does not run on cuda:0 .CUDA error: an illegal"):
        decoder.prepare(SHAPES)


def _features_of(meta: Any) -> Features:
    found = meta._features
    return Features(found["image_embed"][0], *(level[0] for level in found["high_res_feats"]))


POINTS = np.array([[30.0, 60.0], [80.0, 20.0], [10.0, 100.0]])
LABELS = np.array([1, 1, 0])
BOX = np.array([20.0, 30.0, 90.0, 100.0])
CASES: dict[str, dict[str, NDArray[Any]]] = {
    "point": {"point_coords": POINTS[:1], "point_labels": LABELS[:1]},
    "points": {"point_coords": POINTS, "point_labels": LABELS},
    "box": {"box": BOX},
    "box and points": {"box": BOX, "point_coords": POINTS, "point_labels": LABELS},
    "mask alone": {},
}


def _ours(case: dict[str, NDArray[Any]], mask: NDArray[np.float32] | None) -> ObjectPrompt:
    side = tiny.ARCHITECTURE.image_size
    box = case.get("box", np.zeros(0)).reshape(-1, 2)
    coords = np.concatenate((box, case.get("point_coords", np.zeros((0, 2)))))
    labels = np.concatenate(([2, 3][: len(box)], case.get("point_labels", [])))
    (parsed,) = parse_prompts(
        (coords / side).astype(np.float32)[None],
        labels.astype(np.int32)[None],
        None if mask is None else torch.from_numpy(mask),
        LIMITS,
    )
    return parsed


@pytest.mark.semantic(
    "masks",
    "the decoder's masks and scores, with and without `multimask_output`, random weights",
    "Meta's predictor",
)
@pytest.mark.parametrize("refined", [False, True])
@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_answers_are_the_same_as_metas_predictors(
    decoder: Decoder, meta: Any, case: str, multimask: bool, refined: bool
) -> None:
    given = CASES[case]
    mask = None
    if refined or case == "mask alone":
        first = meta.predict(**CASES["point"])
        mask = first[2][:1]
    _, scores, logits = meta.predict(**given, mask_input=mask, multimask_output=multimask)
    (answer,) = decoder.decode([Job(_features_of(meta), [_ours(given, mask)], multimask)])
    close(answer.low_res_masks[0].float(), torch.from_numpy(logits))
    close(answer.iou_predictions[0], torch.from_numpy(scores))


@pytest.mark.semantic(
    "masks", "a single mask that is unstable falls back as Meta's does", "Meta's predictor"
)
def test_a_single_mask_falls_back_when_metas_does(decoder: Decoder, meta: Any) -> None:
    """Without `multimask_output`, an unstable mask gives way to the best candidate, a stable one
    does not; random clicks meet both kinds."""
    clicks = np.random.default_rng(0).random((24, 1, 2)) * tiny.ARCHITECTURE.image_size
    label = np.ones(1, dtype=np.int32)
    stable = set()
    cases = [{"point_coords": click, "point_labels": label} for click in clicks]
    objects = [_ours(case, None) for case in cases]
    single, every = decoder.decode([Job(_features_of(meta), objects, m) for m in (False, True)])
    for n, case in enumerate(cases):
        _, scores, logits = meta.predict(**case, multimask_output=False)
        close(single.low_res_masks[n].float(), torch.from_numpy(logits))
        close(single.iou_predictions[n], torch.from_numpy(scores))
        best = int(every.iou_predictions[n].argmax())
        stable.add(not torch.equal(single.low_res_masks[n, 0], every.low_res_masks[n, best]))
    assert stable == {True, False}


def test_a_missing_program_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match=r"no decoder\.pt2"):
        Decoder(tmp_path / "decoder.pt2", torch.device("cpu"))


DENORMALS = """
import sys, torch
from decoder import Decoder
from pathlib import Path

torch.set_num_threads(2)
decoder = Decoder(Path(sys.argv[1]), torch.device("cpu"))
small = torch.full((2**20,), 1e-39)
survive = lambda _: bool((small * 1).any())
print(survive(None), *decoder._workers.map(survive, range(2), image_tokens=1))
"""


def test_no_thread_multiplies_denormals(program: Path) -> None:
    """In a separate process, whose threads are all started after the decoder."""
    folder = Path(reader.__file__).parent
    command = [sys.executable, "-c", DENORMALS, str(program)]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"] * 3


def test_a_gpu_has_its_index(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, neither `set_device` nor a moved program's own checks accept the device."""
    devices: list[torch.device] = []

    def load(path: Path, device: torch.device) -> ExportedProgram:
        devices.append(device)
        return load_program(path, CPU)

    monkeypatch.setattr("decoder.load_program", load)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    assert Decoder(program, torch.device("cuda")).device == torch.device("cuda:0")
    assert devices == [torch.device("cuda:0")] * 2


def test_the_tolerance_admits_another_summation_order_but_not_another_click(
    decoder: Decoder,
) -> None:
    image = features(1)
    first, second = (decoder.decode([Job(image, [OBJECTS[n]])])[0].low_res_masks for n in (0, 1))
    tolerance = REPLAY_TOLERANCE["cpu"]
    _check_same(first * (1 + tolerance / 8), first, tolerance)
    for other in (second, first * torch.nan):
        with pytest.raises(RuntimeError, match="replayed masks differ"):
            _check_same(other, first, tolerance)
