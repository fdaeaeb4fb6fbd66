"""When a client cannot be used: it is closed, or belongs to another process or event loop.

In a forked child, inherited transports are never used (`forked_error`) and never destroyed, and
OpenCV runs without its threads, which stayed behind in the parent.
"""

import ctypes
import functools
import os
import weakref
from typing import Any

import cv2

from .errors import ClientUnusable


def closed_error(url: str) -> ClientUnusable:
    """The error of a closed client."""
    return ClientUnusable(f"this client of {url} is closed; create a new one")


def forked_error(url: str) -> ClientUnusable:
    """The error of a client in a process that inherited it."""
    return ClientUnusable(
        f"this client of {url} was created before a fork; create one in each process"
    )


def wrong_loop_error(url: str) -> ClientUnusable:
    """The error of an asyncio client in an event loop other than that of its first call."""
    return ClientUnusable(
        f"this client of {url} belongs to another event loop, that of its first call; create one "
        "in each"
    )


_transports: "weakref.WeakSet[Any]" = weakref.WeakSet()


def keep_in_forks(transport: Any) -> None:
    """Have forked children never destroy their copy of a transport."""
    _transports.add(transport)
    _register_fork_handlers()


@functools.cache
def _register_fork_handlers() -> None:
    """Once, with the process's first client: what its forked children do first.

    OpenCV's threads do not exist in a child, and one may have held a lock at the fork, on which the
    child's first mask would wait forever: so the child computes in the calling thread. Zero, not
    one: that would join the threads.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_keep_inherited)
        os.register_at_fork(after_in_child=functools.partial(cv2.setNumThreads, 0))


def _keep_inherited() -> None:
    """In a forked child: never destroy the parent's transports.

    aiohttp's destructors would remove the parent's sockets from the epoll that both processes
    share, and gRPC's would wait for threads that do not exist here. A module-level reference would
    not do: the interpreter drops it as it exits.
    """
    for transport in _transports:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(transport))
