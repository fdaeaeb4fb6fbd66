"""How a transport ends: closed while calls are under way, or inherited by a forked child.

close ─► calls under way in other threads and tasks ─► each raises `closed`
fork  ─► the child's copy ─► never used (`forked`), never destroyed
      └► OpenCV without its threads, which stayed behind
"""

import asyncio
import ctypes
import functools
import os
import time
import weakref
from collections.abc import Coroutine
from typing import Any

import cv2

from .endpoint import Endpoint
from .errors import ClientUnusable, SAM3Error
from .flow import Call
from .translation import translate


def closed(url: str) -> ClientUnusable:
    """What a closed client says."""
    return ClientUnusable(f"this client of {url} is closed; make a new one")


def forked(url: str) -> ClientUnusable:
    """What a client says in a process that inherited it."""
    return ClientUnusable(f"this client of {url} was made before a fork; make one in each process")


def elsewhere(url: str) -> ClientUnusable:
    """What an asyncio client says in another event loop than its first."""
    return ClientUnusable(
        f"this client of {url} belongs to another event loop, that of its first call; make one in "
        "each"
    )


_living: "weakref.WeakSet[Any]" = weakref.WeakSet()


def _keep_inherited() -> None:
    """In a forked child: the parent's transports are never destroyed.

    aiohttp's destructors would take the parent's sockets off the epoll that both processes share,
    and gRPC's would wait for threads that are not here. A module's own reference would not do: the
    interpreter drops it as it exits.
    """
    for transport in _living:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(transport))


@functools.cache
def _guard_forks() -> None:
    """Once, with the process's first client: what its forked children do as they begin.

    OpenCV's threads are not there either, and one may have held a lock at the fork, on which the
    child's first mask would wait for ever: so it computes in the calling thread. Zero, not one:
    that would join them.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_keep_inherited)
        os.register_at_fork(after_in_child=functools.partial(cv2.setNumThreads, 0))


class Endable:
    """What the transports share: the URL to name in errors, and whether they are closed."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._url = endpoint.url
        self._closed = False
        _living.add(self)
        _guard_forks()

    def failure(self, error: Exception, call: Call, started: float) -> SAM3Error:
        """The error a caller sees for `error`, raised by a call begun at `started`."""
        if self._closed:
            return closed(self._url)
        return translate(error, self._url, call.spent + time.monotonic() - started)


class AsyncEndable(Endable):
    """The awaitable transports: each call is a task of its own, which closing ends.

    gRPC cancels whoever awaits a call on a channel that is closed; the caller's own task would
    look as if somebody had cancelled it.
    """

    _client: Any

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint)
        self._under_way: set[asyncio.Task[Any]] = set()

    async def call(self, call: Call) -> Any:
        if self._closed:
            raise closed(self._url)
        started = time.monotonic()
        try:
            return await self._apart(self._send(call))
        except Exception as error:
            raise self.failure(error, call, started) from error

    async def _apart(self, work: Coroutine[Any, Any, Any]) -> Any:
        task = asyncio.ensure_future(work)
        self._under_way.add(task)
        task.add_done_callback(self._done)
        try:
            await asyncio.wait([task])
        finally:
            task.cancel()  # does nothing to one that is done
        if task.cancelled():
            raise ConnectionError("the call was cancelled on its way")
        return task.result()

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._under_way.discard(task)
        if not task.cancelled():
            task.exception()  # looked at here: a cancelled caller will not

    async def _send(self, call: Call) -> Any:
        raise NotImplementedError

    async def close(self) -> None:
        self._closed = True
        if self._under_way:
            for task in self._under_way:
                task.cancel()
            await asyncio.wait(self._under_way)
        await self._client.close()
