"""Perform a flow's steps, blocking or async. The only place where flows meet I/O."""

import asyncio
import time
from dataclasses import replace
from typing import Any, TypeVar

from . import deadline
from .errors import DeadlineExceeded, SAM3Error
from .flow import LONGEST_TIMEOUT, Acquire, Call, Compute, Flow, Sleep, Step
from .tracing import traced
from .transports import AsyncTransport, Transport

T = TypeVar("T")


class Limit:
    """How long a public call may take, whatever the number of its requests, waits and retries."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._started = time.monotonic()
        self.failure: SAM3Error | None = None
        """The last error of a step."""

    def cut(self, step: Step) -> Step:
        """The step with its timeout cut to the time that is left.

        Raises the last failure instead of pausing if no time would be left to try again.
        """
        spent = time.monotonic() - self._started
        left = max(self._seconds - spent, 0.0)
        if isinstance(step, Call):
            return replace(step, timeout=min(step.timeout, left), spent=spent)
        if isinstance(step, Acquire):
            return replace(step, timeout=min(step.timeout, left))
        if isinstance(step, Sleep) and step.seconds >= left and self.failure is not None:
            raise self.failure
        return step


def perform(flow: Flow[T], transport: Transport, timeout: float = LONGEST_TIMEOUT) -> T:
    """Perform a flow's steps one after the other, in `timeout` seconds; return what it returns."""
    resume, value = flow.send, None
    limit = Limit(timeout)
    try:
        while True:
            step = resume(value)
            try:
                resume, value = flow.send, _perform(limit.cut(step), transport)
            except SAM3Error as error:
                resume, value = flow.throw, error
                limit.failure = error
    except StopIteration as done:
        result: T = done.value
        return result
    finally:
        flow.close()  # on Ctrl-C and the like, so that locks and shared memory are released
        value = limit.failure = None  # whose traceback leads back here, and so to the image


async def perform_async(
    flow: Flow[T], transport: AsyncTransport, timeout: float = LONGEST_TIMEOUT
) -> T:
    """The async `perform`; CPU-bound work runs in a thread."""
    resume, value = flow.send, None
    limit = Limit(timeout)
    try:
        while True:
            step = resume(value)
            try:
                resume, value = flow.send, await _perform_async(limit.cut(step), transport)
            except SAM3Error as error:
                resume, value = flow.throw, error
                limit.failure = error
    except StopIteration as done:
        result: T = done.value
        return result
    finally:
        flow.close()
        value = limit.failure = None


def _perform(step: Step, transport: Transport) -> Any:
    if isinstance(step, Call):
        with traced(step) as call:
            return transport.call(call)
    if isinstance(step, Compute):
        return step.function()
    if isinstance(step, Acquire):
        return _acquire(step)
    return time.sleep(step.seconds)


async def _perform_async(step: Step, transport: AsyncTransport) -> Any:
    if isinstance(step, Call):
        with traced(step) as call:
            return await transport.call(call)
    if isinstance(step, Compute):
        return await asyncio.to_thread(step.function)
    if isinstance(step, Acquire):
        return await _acquire_async(step)
    return await asyncio.sleep(step.seconds)


def _acquire(step: Acquire) -> None:
    assert not isinstance(step.lock, asyncio.Lock)
    if not step.lock.acquire(timeout=step.timeout):
        raise _lock_timeout(step.timeout)


async def _acquire_async(step: Acquire) -> None:
    assert isinstance(step.lock, asyncio.Lock)
    try:
        async with deadline.timeout(step.timeout):
            await step.lock.acquire()
    except asyncio.TimeoutError:
        raise _lock_timeout(step.timeout) from None


def _lock_timeout(timeout: float) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"gave up after waiting {timeout:.3g} s for an earlier call about the same image; the "
        "server is slow or overloaded, or the client needs a longer timeout"
    )
