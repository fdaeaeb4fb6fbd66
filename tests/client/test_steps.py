"""Flows performed step by step: what they hold is let go whatever ends them."""

import asyncio
import threading
from typing import Any

import pytest

from triton_sam3.flow import Acquire, Call, Flow, Lock, Query
from triton_sam3.steps import perform, perform_async

METADATA = Query("get_server_metadata")


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


def test_ctrl_c_lets_go_of_what_is_held() -> None:
    lock = threading.Lock()
    flow = holding(lock)  # kept here, as by a traceback
    with pytest.raises(KeyboardInterrupt):
        perform(flow, Interrupted())
    assert not lock.locked()


async def test_a_cancellation_lets_go_of_what_is_held() -> None:
    lock = asyncio.Lock()
    flow = holding(lock)
    task = asyncio.ensure_future(perform_async(flow, Silent()))
    while not lock.locked():
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not lock.locked()
