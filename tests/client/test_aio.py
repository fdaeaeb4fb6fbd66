"""The asyncio client against the real server, over gRPC and HTTP."""

import asyncio
import gc
import os
import random
import signal
from collections.abc import Callable
from functools import partial

import grpc  # type: ignore[import-untyped]
import numpy as np
import pytest
from numpy.typing import NDArray

from server import TritonServer
from tests.client import misbehaving
from tests.client.statistics import encodings
from tests.stubs import suspended_model
from triton_sam3 import (
    AsyncClient,
    Client,
    ClientUnusable,
    DeadlineExceeded,
    Segmentation,
)
from triton_sam3.deadline import timeout
from triton_sam3.endpoint import Endpoint
from triton_sam3.flow import Acquire, Call, Flow, Query
from triton_sam3.steps import perform_async
from triton_sam3.transports import AsyncTransport, open_async_transport

Pixels = NDArray[np.uint8]
Fresh = Callable[[], Pixels]
POINTS = [(110, 80)]
BOXES = [(95, 60, 140, 110), (10, 20, 70, 80)]
VIEWS, CLICKS = 20, 10


@pytest.mark.semantic("session", "awaited and blocking answers are the same", "equality")
async def test_awaited_and_blocking_answers_are_the_same(url: str, coins: Pixels) -> None:
    with Client(url) as client:
        expected = client.segment(coins, POINTS, BOXES)
    async with AsyncClient(url) as client_async:
        result = await client_async.segment(coins, POINTS, BOXES)
    np.testing.assert_array_equal(result.masks, expected.masks)
    np.testing.assert_array_equal(result.scores, expected.scores)


async def test_a_view_is_entered_or_awaited(url: str, coins: Pixels) -> None:
    async with AsyncClient(url) as client:
        async with client.open(coins) as view:
            first = await view.click(110, 80)
        with pytest.raises(ClientUnusable, match="view is closed"):
            await view.click(110, 80)
        awaited = await client.open(coins)
        again = await awaited.click(110, 80)
        async with await client.open(coins) as view:
            assert view.size == (384, 303)
            await view.click(60, 200)
            assert len(await view.reset()) == 0
            np.testing.assert_array_equal((await view.click(110, 80)).logits, first.logits)
            assert len(await view.segment(boxes=BOXES, threshold=-1)) == 2
            assert len(await view.undo()) == 0
            np.testing.assert_array_equal((await view.redo()).logits, first.logits)
        await awaited.close()
        for use in (awaited.undo, awaited.redo, awaited.reset, partial(awaited.click, 110, 80)):
            with pytest.raises(ClientUnusable, match="view is closed"):
                await use()
    np.testing.assert_array_equal(again.logits, first.logits)


async def test_opening_an_image_can_be_a_task(url: str, coins: Pixels) -> None:
    async with AsyncClient(url) as client:
        task = asyncio.create_task(client.open(coins))
        view = await task
        assert len(await view.click(110, 80)) == 1
        cancelled = asyncio.create_task(client.open(coins[::-1]))
        await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        never = client.open(coins)
        never.close()  # as of a coroutine that is not wanted after all


def clicks_of(number: int) -> list[tuple[float, float, bool]]:
    """The clicks made on one image: where and how depends on its number."""
    rng = np.random.default_rng(number)
    xy = rng.uniform(10, 290, (CLICKS, 2))
    return [(x, y, bool(i % 3 != 2)) for i, (x, y) in enumerate(xy.tolist())]


@pytest.fixture(scope="module")
def pictures(coins: Pixels) -> list[Pixels]:
    return [np.roll(coins, 17 * number, axis=1) for number in range(VIEWS)]


@pytest.fixture(scope="module")
def clicked_in_turn(server: TritonServer, pictures: list[Pixels]) -> list[list[Segmentation]]:
    """What each view answers when it is clicked alone, one click after the other."""
    answers = []
    with Client(server.grpc_url) as client:
        for number, image in enumerate(pictures):
            with client.open(image) as view:
                answers.append([view.click(*click) for click in clicks_of(number)])
    return answers


@pytest.mark.semantic(
    "session", "200 clicks at once over 20 views: none lost, none mixed up", "equality"
)
async def test_200_clicks_at_once_over_20_views(
    url: str,
    server: TritonServer,
    pictures: list[Pixels],
    clicked_in_turn: list[list[Segmentation]],
) -> None:
    async with AsyncClient(url) as client:
        views = await asyncio.gather(*(client.open(image) for image in pictures))
        before = encodings(server)
        answers = await asyncio.gather(
            *(
                view.click(*click)
                for turn in range(CLICKS)
                for view, click in (
                    (views[number], clicks_of(number)[turn]) for number in range(VIEWS)
                )
            )
        )
        assert encodings(server) == before
        assert len(answers) == VIEWS * CLICKS
        for place, answer in enumerate(answers):
            turn, number = divmod(place, VIEWS)
            # As if each view were clicked alone, but for rounding: objects are decoded together.
            reference = clicked_in_turn[number][turn]
            np.testing.assert_allclose(answer.scores, reference.scores, atol=1e-2)
            assert np.mean(answer.masks != reference.masks) < 1e-2
        undone = await asyncio.gather(*(view.undo() for view in views))
    assert [result is answers[-2 * VIEWS + number] for number, result in enumerate(undone)] == (
        [True] * VIEWS
    )


async def test_concurrent_requests_about_a_new_image_encode_it_once(
    url: str, fresh: Fresh, server: TritonServer
) -> None:
    image = fresh()
    async with AsyncClient(url) as client:
        before = encodings(server)
        await asyncio.gather(*(client.segment(image, POINTS) for _ in range(12)))
        assert encodings(server) == before + 1


async def test_a_cancelled_click_leaves_the_view_usable(url: str, coins: Pixels) -> None:
    async with AsyncClient(url) as client, client.open(coins) as view:
        first = await view.click(110, 80)
        task = asyncio.ensure_future(view.click(60, 200))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        second = await view.click(60, 200)
        assert await view.undo() is first
        assert second is not first


@pytest.mark.parametrize("scheme", ["grpc", "http"])
async def test_a_cancellation_that_arrives_with_the_answer_is_not_lost(scheme: str) -> None:
    server = {
        "grpc": misbehaving.grpc_server((grpc.StatusCode.OK, "")),
        "http": misbehaving.http((200, misbehaving.METADATA)),
    }[scheme]
    with server as (url, _):
        transport = open_async_transport(Endpoint.parse(url), {})
        for _ in range(40):
            task = asyncio.ensure_future(_calls_until_cancelled(transport))
            await asyncio.sleep(random.uniform(0.005, 0.02))
            task.cancel()
            done, _ = await asyncio.wait([task], timeout=5)
            assert done
            assert task.cancelled()
        await transport.close()


async def _calls_until_cancelled(transport: AsyncTransport) -> None:
    while True:
        await transport.call(Call(Query("get_server_metadata"), 20.0))


async def test_a_cancelled_encoding_does_not_block_the_image(
    url: str, fresh: Fresh, server: TritonServer
) -> None:
    image = fresh()
    async with AsyncClient(url) as client:
        with suspended_model(server):
            task = asyncio.ensure_future(client.segment(image, POINTS))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert len(await client.segment(image, POINTS, threshold=-1)) == 1


@pytest.mark.parametrize("scheme", ["grpc", "http"])
async def test_callers_that_wait_for_an_image_share_its_timeout(scheme: str, coins: Pixels) -> None:
    with misbehaving.tcp(hang_up=False) as port:
        url = f"{scheme}://127.0.0.1:{port}"
        async with AsyncClient(url, timeout=0.5) as client:
            started = asyncio.get_running_loop().time()
            outcomes = await asyncio.gather(
                *(client.segment(coins, POINTS) for _ in range(20)), return_exceptions=True
            )
            assert {type(outcome) for outcome in outcomes} == {DeadlineExceeded}
            # Twenty deadlines one after the other would be 10 s.
            assert asyncio.get_running_loop().time() - started < 5


async def test_a_closed_client_raises_client_unusable(url: str, coins: Pixels) -> None:
    client = AsyncClient(url)
    await client.segment(coins, POINTS)
    await client.close()
    await client.close()
    with pytest.raises(ClientUnusable, match="is closed"):
        await client.segment(coins, POINTS)


async def test_waiting_for_a_lock_that_is_changing_hands_times_out() -> None:
    transport = open_async_transport(Endpoint.parse("grpc://127.0.0.1:1"), {})

    def wait(lock: asyncio.Lock) -> Flow[None]:
        yield Acquire(lock, 0.05)

    lock = asyncio.Lock()
    await lock.acquire()
    holder = asyncio.ensure_future(lock.acquire())
    await asyncio.sleep(0)
    lock.release()  # the next one holds it only once it runs
    with pytest.raises(DeadlineExceeded):
        async with timeout(5):
            await perform_async(wait(lock), transport)
    assert await holder
    await transport.close()


def test_a_client_in_another_event_loop_raises_client_unusable(url: str, coins: Pixels) -> None:
    client = AsyncClient(url)
    assert len(asyncio.run(client.segment(coins, POINTS, threshold=-1))) == 1
    with pytest.raises(ClientUnusable, match="belongs to another event loop"):
        asyncio.run(client.segment(coins, POINTS))
    asyncio.run(client.close())


async def test_a_cancelled_undo_leaves_the_clicks_as_they_were(url: str, coins: Pixels) -> None:
    async with AsyncClient(url) as client, client.open(coins) as view:
        first = (await view.click(110, 80)).logits.copy()
        second = (await view.click(60, 200)).logits.copy()
        await view.click(200, 100)
        gc.collect()
        task = asyncio.ensure_future(view.undo())
        await asyncio.sleep(0)  # the answer is being made again
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        np.testing.assert_array_equal((await view.undo()).logits, second)
        np.testing.assert_array_equal((await view.undo()).logits, first)


async def test_closing_ends_the_calls_in_flight_in_other_tasks(url: str, coins: Pixels) -> None:
    async def segment_on(client: AsyncClient) -> None:
        while True:
            await client.segment(coins, POINTS)

    ended: list[BaseException | None] = []
    for pause in (0.0, 0.02, 0.05, 0.1, 0.2, 0.4):
        client = AsyncClient(url, remember_images=0)
        tasks = [asyncio.ensure_future(segment_on(client)) for _ in range(4)]
        await asyncio.sleep(pause)
        await client.close()
        done, _ = await asyncio.wait(tasks, timeout=30)
        assert not any(task.cancelled() for task in done)
        ended += [task.exception() for task in done]
    assert len(ended) == 24
    assert {type(error) for error in ended} == {ClientUnusable}
    assert all("is closed" in str(error) for error in ended)


@pytest.mark.parametrize("scheme", ["grpc", "http"])
async def test_a_task_cancelled_as_the_client_closes_is_cancelled(
    scheme: str, coins: Pixels
) -> None:
    with misbehaving.tcp(hang_up=False) as port:
        client = AsyncClient(f"{scheme}://127.0.0.1:{port}")
        task = asyncio.ensure_future(client.segment(coins, POINTS))
        await asyncio.sleep(0.02)
        task.cancel()
        await client.close()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_forked_child_is_told_to_create_its_own_client(url: str, coins: Pixels) -> None:
    async with AsyncClient(url) as client:
        await client.segment(coins, POINTS)
        child = os.fork()
        if not child:
            signal.alarm(30)
            try:
                await client.segment(coins, POINTS)
            except ClientUnusable as error:
                await client.close()
                os._exit(7 if "created before a fork" in str(error) else 1)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        await client.segment(coins[:100], POINTS)


@pytest.mark.parametrize("scheme", ["grpc", "http"])
async def test_a_cancelled_call_does_not_stay_in_flight(scheme: str) -> None:
    """It would go on sending its image, and hold its connection until its timeout."""
    with misbehaving.tcp(hang_up=False) as port:
        transport = open_async_transport(Endpoint.parse(f"{scheme}://127.0.0.1:{port}"), {})
        others = asyncio.all_tasks()
        task = asyncio.ensure_future(_calls_until_cancelled(transport))
        while asyncio.all_tasks() <= {*others, task}:
            await asyncio.sleep(0)  # until it is on its way, in a task of its own
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with timeout(5):
            while asyncio.all_tasks() - others:
                await asyncio.sleep(0.01)
        await transport.close()


async def test_closing_in_another_loop_is_an_error_and_closes_nothing(url: str) -> None:
    client = AsyncClient(url)
    await client.status()

    def elsewhere() -> None:
        with pytest.raises(ClientUnusable, match="belongs to another event loop"):
            asyncio.run(client.close())

    await asyncio.to_thread(elsewhere)
    await client.status()
    await client.close()
