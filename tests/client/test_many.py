"""Many images at once, against the real server where one is needed."""

import asyncio
import gc
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import supervision as sv
from numpy.typing import NDArray
from PIL import Image

from server import TritonServer
from tests.client import misbehaving
from tests.client.statistics import encodings
from triton_sam3 import AsyncClient, Client, ImageError, Prompt, PromptError, ServerUnreachable
from triton_sam3.engine import Picture
from triton_sam3.geometry import ImageLike
from triton_sam3.many import Job, Outcome, jobs, run, run_async

Pixels = NDArray[np.uint8]
Fresh = Callable[[], Pixels]
POINT = {"points": [(110, 80)]}
BOX = {"boxes": [(95, 60, 140, 110)]}


def test_one_mapping_applies_to_every_image() -> None:
    prompts = [job.prompts() for job in jobs(["a", "b"], POINT, 1)]
    assert len(prompts) == 2
    assert prompts[0][0].points == prompts[1][0].points


def test_each_image_may_have_its_own_prompts() -> None:
    prompts: list[Any] = [POINT, [Prompt(box=(0, 0, 5, 5)), Prompt(points=[(1, 1)])], {"boxes": []}]
    assert [len(job.prompts()) for job in jobs(list("abc"), prompts, 1)] == [1, 2, 0]


def test_a_detectors_boxes_may_be_an_images_prompts() -> None:
    found = sv.Detections(xyxy=np.array([[0.0, 0, 5, 5], [1, 1, 9, 9]]), class_id=np.array([3, 4]))
    prompts = [job.prompts() for job in jobs(list("ab"), [found, sv.Detections.empty()], 1)]
    assert [[prompt.class_id for prompt in group] for group in prompts] == [[3, 4], []]


def test_another_number_of_prompts_than_images_is_rejected_at_once() -> None:
    with pytest.raises(PromptError, match="prompts for 2 images, but 3 images"):
        jobs(["a", "b", "c"], [POINT, POINT], 1)
    with pytest.raises(PromptError, match="one entry per image, got 5"):
        jobs(["a.png"], 5, 1)
    for invalid in (0, "8", 2.0, None):
        with pytest.raises(ValueError, match="concurrency must be an integer of at least 1, got"):
            jobs(["a"], POINT, cast("int", invalid))


def test_a_dataset_may_have_only_items() -> None:
    class Dataset:
        def __getitem__(self, index: int) -> str:
            return "abc"[index]

    assert [job.image for job in jobs(cast("Any", Dataset()), POINT, 1)] == list("abc")


@pytest.mark.parametrize(
    "image",
    [
        *("a.jpg", Path("a.jpg"), b"data", bytearray(3), memoryview(b"data"), io.BytesIO(b"data")),
        *(np.zeros((4, 5, 3), np.uint8), Image.new("L", (2, 2)), 5, None),
    ],
)
def test_a_single_image_is_rejected(image: Any) -> None:
    with pytest.raises(ImageError, match="wrap a single image in a list"):
        jobs(image, POINT, 1)


def test_an_array_of_images_is_accepted() -> None:
    assert len(list(jobs(np.zeros((6, 4, 5, 3), np.uint8), POINT, 1))) == 6


def test_too_few_prompts_from_an_iterator_are_an_error() -> None:
    work = jobs(iter(["a", "b", "c"]), iter([POINT, POINT]), 1)
    with pytest.raises(PromptError, match="prompts for 2 images, but more images"):
        list(work)


def test_an_unknown_key_is_an_error_of_its_image_only() -> None:
    (job,) = jobs(["a"], [{"point": [(1, 1)]}], 1)
    with pytest.raises(PromptError, match="an unknown key; use 'points' and 'boxes'"):
        job.prompts()


class ConcurrencyRecorder:
    """Jobs that end when told to, and how many are at work."""

    def __init__(self, count: int) -> None:
        self.taken = 0
        self.at_work = 0
        self.most = 0
        self._count = count
        self._guard = threading.Lock()

    def images(self) -> Iterator[str]:
        for number in range(self._count):
            self.taken += 1
            yield str(number)

    def attempt(self, job: Job) -> Outcome:
        with self._guard:
            self.at_work += 1
            self.most = max(self.most, self.at_work)
        time.sleep(0.05 if job.index % 4 == 0 else 0.005)
        with self._guard:
            self.at_work -= 1
        return Outcome(job.index, job.image)

    async def attempt_async(self, job: Job) -> Outcome:
        self.at_work += 1
        self.most = max(self.most, self.at_work)
        await asyncio.sleep(0.05 if job.index % 4 == 0 else 0.005)
        self.at_work -= 1
        return Outcome(job.index, job.image)


@pytest.mark.parametrize("in_order", [True, False])
async def test_concurrency_is_limited_and_no_image_is_lost(in_order: bool) -> None:
    for asynchronous in (False, True):
        recorder = ConcurrencyRecorder(20)
        work = jobs(recorder.images(), POINT, 4)
        seen = []
        if asynchronous:
            async for outcome in run_async(work, recorder.attempt_async, 4, in_order):
                seen.append(outcome.index)
                assert recorder.taken <= len(seen) + 4
        else:
            for outcome in run(work, recorder.attempt, 4, in_order):
                seen.append(outcome.index)
                assert recorder.taken <= len(seen) + 4
        assert sorted(seen) == list(range(20))
        assert (seen == sorted(seen)) is in_order
        assert recorder.most == 4


@pytest.mark.parametrize("in_order", [True, False])
async def test_outcomes_come_before_an_error_of_the_images_iterable(in_order: bool) -> None:
    def images() -> Iterator[ImageLike]:
        yield from "abcdef"
        raise OSError("the folder is gone")

    for asynchronous in (False, True):
        recorder = ConcurrencyRecorder(0)
        work = jobs(images(), POINT, 4)
        seen = []
        with pytest.raises(OSError, match="the folder is gone"):
            if asynchronous:
                async for outcome in run_async(work, recorder.attempt_async, 4, in_order):
                    seen.append(outcome.index)
            else:
                for outcome in run(work, recorder.attempt, 4, in_order):
                    seen.append(outcome.index)
        assert sorted(seen) == list(range(6))


async def test_stopping_early_takes_no_further_images() -> None:
    recorder = ConcurrencyRecorder(100)
    outcomes = run(jobs(recorder.images(), POINT, 4), recorder.attempt, 4, True)
    assert next(outcomes).index == 0
    outcomes.close()
    assert recorder.taken <= 5

    recorder = ConcurrencyRecorder(100)
    waiting = run_async(jobs(recorder.images(), POINT, 4), recorder.attempt_async, 4, True)
    assert (await anext(waiting)).index == 0
    await waiting.aclose()
    assert recorder.taken <= 5


def test_stopping_early_does_not_wait_for_images_in_flight() -> None:
    released = threading.Event()

    def attempt(job: Job) -> Outcome:
        if job.index:
            assert released.wait(30)
        return Outcome(job.index, job.image)

    outcomes = run(jobs(list("abc"), POINT, 2), attempt, 2, True)
    assert next(outcomes).index == 0
    timer = threading.Timer(20, released.set)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        outcomes.throw(KeyboardInterrupt)
    assert not released.is_set()
    released.set()
    timer.cancel()


@pytest.mark.semantic("ways to call", "one failed image of many loses no other", "the contract")
def test_a_failed_image_does_not_stop_the_others(url: str, coins: Pixels, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nno more")
    images: list[ImageLike] = [coins, "nowhere.png", broken, coins, coins[:60, :60]]
    with Client(url) as client:
        alone = client.segment(coins, points=[(110, 80)])
        outcomes = list(client.segment_many(images, POINT, concurrency=3))
    assert [outcome.index for outcome in outcomes] == list(range(5))
    assert [type(outcome.error) for outcome in outcomes] == [
        type(None),
        ImageError,
        ImageError,
        type(None),
        PromptError,  # outside the small image
    ]
    for outcome in (outcomes[0], outcomes[3]):
        np.testing.assert_allclose(outcome.unwrap().logits, alone.logits, atol=2e-2)
    with pytest.raises(ImageError, match=r"nowhere\.png"):
        outcomes[1].unwrap()


async def test_the_async_client_yields_outcomes_as_completed(
    url: str, fresh: Fresh, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [fresh() for _ in range(6)]
    async with AsyncClient(url) as client:
        outcomes = [
            outcome
            async for outcome in client.segment_many(images, [POINT, BOX] * 3, in_order=False)
        ]
        assert sorted(outcome.index for outcome in outcomes) == list(range(6))
        for outcome in outcomes:
            prompt: dict[str, Any] = (POINT, BOX)[outcome.index % 2]
            alone = await client.segment(images[outcome.index], **prompt)
            assert outcome.image is images[outcome.index]
            np.testing.assert_allclose(outcome.unwrap().scores, alone.scores, atol=1e-2)


def test_the_images_are_not_kept(url: str, fresh: Fresh, server: TritonServer) -> None:
    image = fresh()
    with Client(url) as client:
        before = encodings(server)
        assert all(not o.error for o in client.segment_many([image, image], POINT))
        client.segment(image, points=POINT["points"])
        assert encodings(server) == before + 3


async def test_the_images_of_the_async_client_are_not_kept(
    url: str, fresh: Fresh, server: TritonServer
) -> None:
    image = fresh()
    async with AsyncClient(url) as client:
        before = encodings(server)
        assert not any([o.error async for o in client.segment_many([image, image], POINT)])
        await client.segment(image, points=POINT["points"])
        assert encodings(server) == before + 3


async def test_closing_cancels_the_tasks_in_flight() -> None:
    ended: list[int] = []

    async def attempt(job: Job) -> Outcome:
        try:
            if job.index:
                await asyncio.sleep(3600)
            return Outcome(job.index, job.image)
        finally:
            ended.append(job.index)

    async with aclosing(run_async(jobs(list("abcd"), POINT, 3), attempt, 3, True)) as outcomes:
        assert (await anext(outcomes)).index == 0
        await asyncio.sleep(0)  # the others start
        assert ended == [0]
    assert sorted(ended) == [0, 1, 2]


def test_a_mapping_may_hold_iterators() -> None:
    boxes = {"boxes": zip([0, 1], [0, 1], [5, 6], [5, 6], strict=True)}
    assert [len(job.prompts()) for job in jobs(list("abc"), boxes, 1)] == [2, 2, 2]


def pictures() -> int:
    """How many decoded images are alive."""
    return sum(isinstance(thing, Picture) for thing in gc.get_objects())


async def test_failed_outcomes_do_not_hold_their_images(fresh: Fresh, tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path in paths:
        Image.fromarray(fresh()).save(path)
    url = f"grpc://127.0.0.1:{misbehaving.unused_port()}"
    before = pictures()
    with Client(url, retries=0) as client:
        failed = list(client.segment_many(paths, POINT))
    async with AsyncClient(url, retries=0) as client_async:
        failed += [outcome async for outcome in client_async.segment_many(paths, POINT)]
    assert [type(outcome.error) for outcome in failed] == [ServerUnreachable] * 6
    gc.collect()
    assert pictures() == before


def test_prompts_left_over_are_an_error_after_the_last_image() -> None:
    """As with a list of images, whose number is known."""
    work = jobs(iter(["a.jpg", "b.jpg"]), [POINT] * 3, 1)
    assert [next(work).index, next(work).index] == [0, 1]
    with pytest.raises(PromptError, match="prompts for 3 images, but 2 images"):
        next(work)
    endless = jobs(iter(["a.jpg"]), iter([POINT] * 3), 1)
    assert [job.index for job in endless] == [0]
