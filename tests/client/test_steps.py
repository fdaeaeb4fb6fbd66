"""Flows performed step by step: one limit of time, and what they hold is let go."""

import asyncio
import gc
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest

from tests.client import misbehaving
from triton_sam3 import AsyncClient, Client, DeadlineExceeded, Overloaded, ServerUnreachable
from triton_sam3.endpoint import Endpoint
from triton_sam3.engine import Picture
from triton_sam3.flow import Acquire, Call, Flow, Lock, Query, Sleep
from triton_sam3.steps import perform, perform_async
from triton_sam3.transports import LoopThread, open_async_transport, open_transport

METADATA = Query("get_server_metadata")
Make = Callable[[Callable[[], Lock]], Flow[Any]]


def run(make: Make, url: str, timeout: float) -> Any:
    transport = open_transport(Endpoint.parse(url), {})
    try:
        return perform(make(threading.Lock), transport, timeout)
    finally:
        transport.close()


def run_async(make: Make, url: str, timeout: float) -> Any:
    async def main() -> Any:
        transport = open_async_transport(Endpoint.parse(url), {})
        try:
            return await perform_async(make(asyncio.Lock), transport, timeout)
        finally:
            await transport.close()

    return asyncio.run(main())


both = pytest.mark.parametrize("perform_flow", [run, run_async])
Run = Callable[[Make, str, float], Any]


@both
@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_the_requests_of_a_call_share_its_timeout(perform_flow: Run, scheme: str) -> None:
    def twice(_: Any) -> Flow[None]:
        with pytest.raises(DeadlineExceeded):
            yield Call(METADATA, 0.3)
        yield Call(METADATA, 60.0)

    with misbehaving.tcp(hang_up=False) as port:
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"did not answer within") as caught:
            perform_flow(twice, f"{scheme}://127.0.0.1:{port}", 0.6)
        assert time.monotonic() - started < 30
    (waited,) = re.findall(r"within ([\d.]+) s", str(caught.value))
    assert float(waited) >= 0.6  # with the first request's


@both
def test_waiting_for_a_lock_counts_towards_the_timeout(perform_flow: Run) -> None:
    def wait(make_lock: Callable[[], Lock]) -> Flow[None]:
        lock = make_lock()
        yield Acquire(lock, 60.0)
        yield Acquire(lock, 60.0)

    with pytest.raises(DeadlineExceeded, match=r"gave up after waiting 0\.[0-3]\d* s"):
        perform_flow(wait, f"http://127.0.0.1:{misbehaving.unused_port()}", 0.3)


@both
def test_a_pause_that_leaves_no_time_raises_the_last_error(perform_flow: Run) -> None:
    def again(_: Any) -> Flow[Any]:
        with pytest.raises(Overloaded):
            yield Call(METADATA, 60.0)
        yield Sleep(60.0)
        return (yield Call(METADATA, 60.0))

    busy, well = (429, b'{"error": "busy"}'), (200, misbehaving.METADATA)
    with misbehaving.http(busy, well) as (url, counter), pytest.raises(Overloaded, match="busy"):
        perform_flow(again, url, 30.0)
    assert counter.requests == 1


async def test_a_clients_timeout_applies_to_its_calls() -> None:
    with misbehaving.http((200, b'{"versions": ["1"]}'), delay=0.2) as (url, counter):
        with Client(url, timeout=0.7) as client, pytest.raises(DeadlineExceeded):
            client.status()  # seven requests and more
        assert counter.requests < 7
        async with AsyncClient(url, timeout=0.7) as client_async:
            with pytest.raises(DeadlineExceeded):
                await client_async.status()


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def pictures() -> int:
    """How many decoded images are alive."""
    return sum(isinstance(thing, Picture) for thing in gc.get_objects())


def loops() -> int:
    return sum(isinstance(thread, LoopThread) for thread in threading.enumerate())


@pytest.mark.parametrize("scheme", ["grpc", "http"])
async def test_a_failed_call_leaves_nothing_to_the_garbage_collector(scheme: str) -> None:
    """Which does not see how large an image is."""
    url, image = f"{scheme}://127.0.0.1:{misbehaving.unused_port()}", np.zeros((8, 8, 3), np.uint8)
    before, threads = pictures(), loops()
    with without_garbage_collection():
        client = Client(url, retries=0)
        for _ in range(3):
            with suppress(ServerUnreachable):
                client.segment(image, [(1, 1)])
        assert pictures() == before
        del client
        assert loops() == threads
        async with AsyncClient(url, retries=0) as client_async:
            for _ in range(3):
                with suppress(ServerUnreachable):
                    await client_async.segment(image, [(1, 1)])
            assert pictures() == before


@both
def test_a_retried_call_leaves_its_result_to_the_caller(perform_flow: Run) -> None:
    class Result:
        """Can be referenced weakly."""

    def again(_: Any) -> Flow[Result]:
        with pytest.raises(Overloaded):
            yield Call(METADATA, 60.0)
        yield Call(METADATA, 60.0)
        return Result()

    busy, well = (429, b'{"error": "busy"}'), (200, misbehaving.METADATA)
    with misbehaving.http(busy, well) as (url, _), without_garbage_collection():
        result = perform_flow(again, url, 30.0)
        reference = weakref.ref(result)
        del result
        assert reference() is None


class Interrupted:
    """A transport on which Ctrl-C comes while the answer is waited for."""

    def call(self, call: Call) -> Any:  # noqa: ARG002 - the protocol's
        raise KeyboardInterrupt

    def close(self) -> None: ...


class Silent:
    """An async transport to a server that does not answer."""

    async def call(self, call: Call) -> Any:  # noqa: ARG002 - the protocol's
        await asyncio.sleep(3600)

    async def close(self) -> None: ...


def holding(lock: Lock) -> Flow[None]:
    yield Acquire(lock, 1.0)
    try:
        yield Call(METADATA, 1.0)
    finally:
        lock.release()


def test_ctrl_c_releases_locks() -> None:
    lock = threading.Lock()
    flow = holding(lock)  # kept here, as by a traceback
    with pytest.raises(KeyboardInterrupt):
        perform(flow, Interrupted())
    assert not lock.locked()


async def test_a_cancellation_releases_locks() -> None:
    lock = asyncio.Lock()
    flow = holding(lock)
    task = asyncio.ensure_future(perform_async(flow, Silent()))
    while not lock.locked():
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not lock.locked()
