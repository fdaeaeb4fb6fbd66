"""Tensors in memory that client and server share, instead of in the request.

    request ─► arrays copied into a region ─► server told where they are ─► region back in the pool
            once per region: create ─► register ─► unlink; then only the mappings keep it alive

A region is free, busy (with a request, or being unregistered), or lost: without an answer, the
server may still be reading it.

Nothing outlives its users. A region's file exists only from creation to registration, so a crash
leaves one behind only in that instant. Such a file, and what the server still has mapped for a dead
process, is swept by the next client, which knows the owner from the name; so are regions that a
closed client of the same process had to leave.
"""

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from time import monotonic
from typing import Any

import numpy as np

from .errors import SAM3Error, ServerError, TransportError
from .flow import Array, Call, Flow, Infer, InSharedMemory, Query, Sleep
from .regions import (
    Kind,
    Region,
    abandon,
    check_available,
    is_abandoned,
    make_region,
    sweep_files,
)
from .retry import Retries
from .translation import RegionInUse, RegionKnown, RegionLost

MIN_SHARED_BYTES = 64 * 1024
"""Smaller tensors are sent in the request: copying them costs less than naming a region."""

_REGION_GRANULARITY = 1 << 20
"""Region sizes are multiples of this many bytes, so that slightly different sizes share one."""

_MAX_REGIONS = 32
"""Most regions a client holds, one per request; further concurrent requests do without."""

_CLOSE_TIMEOUT = 5.0
"""Most seconds to wait for a server to release a region; closing must not hang."""

_POLL_INTERVAL = 0.01
"""Seconds until a server that still uses a region is asked again to release it."""

_log = logging.getLogger(__name__)


class SharedMemory:
    """The regions of one client, and the flow that sends a request through one of them."""

    def __init__(self, kind: Kind) -> None:
        check_available(kind)
        self._kind = kind
        self._free: list[Region] = []
        self._busy: list[Region] = []
        self._lost: list[Region] = []
        self._lock = threading.Lock()
        self._closed = False
        self._swept = False

    def send(self, request: Infer, retries: Retries) -> Flow[Any]:
        """Send `request` with its large inputs in a region; a restarted server gets a new one."""
        large = dict(_large(request.inputs))
        if not large:
            return (yield from retries.send(request))
        try:
            return (yield from self._send_once(request, large, retries))
        except RegionLost:
            self._mark_all_lost()
            return (yield from self._send_once(request, large, retries))

    def _send_once(self, request: Infer, large: Mapping[str, Array], retries: Retries) -> Flow[Any]:
        size = sum(_padded(array.nbytes) for array in large.values())
        region = yield from self._take(size, retries)
        if region is None:
            return (yield from retries.send(request))
        answered = False
        try:
            placed = _place(region, large)
            outputs = yield from retries.send(replace(request, inputs={**request.inputs, **placed}))
            answered = True
            return outputs
        except SAM3Error as error:
            answered = isinstance(error, ServerError) and not isinstance(error, RegionLost)
            raise
        finally:
            # Without an answer the server may still be reading: the region is not used again.
            self._put_back(region, self._free if answered else self._lost)

    def _take(self, size: int, retries: Retries) -> Flow[Region | None]:
        """A region of at least `size` bytes; None where there is no more memory to share."""
        region = self._reuse(size)
        if region is None:
            self._give_up_the_smallest()
            with suppress(TransportError):  # the next caller tries again
                yield from self._forget_lost()
            region = self._make(_round_up(size))
            if region is not None:
                yield from self._register(region, retries)
        return region

    def _reuse(self, size: int) -> Region | None:
        with self._lock:
            for index, region in enumerate(self._free):
                if region.size >= size and not self._closed:
                    self._busy.append(region)
                    return self._free.pop(index)
        return None

    def _give_up_the_smallest(self) -> None:
        """If there are as many regions as may be, but none that is free is large enough."""
        with self._lock:
            if self._free and self._held() >= _MAX_REGIONS:
                smallest = min(self._free, key=lambda region: region.size)
                self._free.remove(smallest)
                self._lost.append(smallest)

    def _held(self) -> int:
        """How many regions there are. Hold the lock, as they move between the lists."""
        return len(self._free) + len(self._busy) + len(self._lost)

    def _make(self, size: int) -> Region | None:
        with self._lock:
            if self._closed or self._held() >= _MAX_REGIONS:
                return None
            try:
                region = make_region(self._kind, size)
            except OSError as error:
                _log.warning("no shared memory (%s): sending the image in the request", error)
                return None
            self._busy.append(region)
            return region

    def _register(self, region: Region, retries: Retries) -> Flow[None]:
        try:
            with suppress(RegionKnown):  # it was registered, but the answer was lost
                yield from retries.send(region.register())
            region.registered()
            yield from self._sweep(retries)
        except BaseException as error:
            # The server may have mapped it nonetheless, unless it has said that it has not.
            self._put_back(region, self._lost)
            if isinstance(error, ServerError):
                raise _not_shared(self._kind, error) from error
            raise

    def _put_back(self, region: Region, place: list[Region] | None) -> None:
        """Return a region to a list; free it if there is none, or closing has abandoned it."""
        with self._lock:
            abandoned = region not in self._busy
            if not abandoned:
                self._busy.remove(region)
                if place is not None:
                    place.append(region)
                    return
        abandon(region) if abandoned else region.close()

    def _mark_all_lost(self) -> None:
        """A server that lost one region has lost them all."""
        with self._lock:
            self._lost += self._free
            self._free.clear()

    def _sweep(self, retries: Retries) -> Flow[None]:
        """Once, and only when a region of ours has shown that the server is on this host: which
        processes are dead here says nothing about another host."""
        with self._lock:
            sweep, self._swept = not self._swept, True
        if sweep:
            yield from _sweep(self._kind, retries)

    def close(self) -> Flow[None]:
        """Unregister every region and free it.

        Waits for requests in flight, but not forever, and not for a server that does not answer.
        """
        self._closed = True
        end = monotonic() + _CLOSE_TIMEOUT
        while True:
            self._mark_all_lost()
            try:
                yield from self._forget_lost()
            except TransportError:
                break
            with self._lock:
                if not self._held():
                    return
            if monotonic() >= end:
                break
            yield Sleep(_POLL_INTERVAL)
        self._abandon_lost()

    def abandon(self) -> None:
        """Leave every region to the next client; there must be no request in flight."""
        self._mark_all_lost()
        self._abandon_lost()

    def _abandon_lost(self) -> None:
        """Leave lost regions to the next client; a busy region is freed with its request."""
        with self._lock:
            lost, self._lost = self._lost, []
            self._busy.clear()
        for region in lost:
            abandon(region)

    def _forget_lost(self) -> Flow[None]:
        """Unregister and free the lost regions, except those that the server still uses.

        Raises TransportError at the first without an answer: the others would wait as long.
        """
        for _ in range(len(self._lost)):
            with self._lock:  # one at a time, so that a caller cancelled midway forgets none
                if not self._lost:
                    return
                region = self._lost.pop(0)
                self._busy.append(region)  # closing waits for this as well
            gone = False
            try:
                gone = yield from _unregister(region)
            finally:
                self._put_back(region, None if gone else self._lost)


def _unregister(region: Region) -> Flow[bool]:
    """Whether the server has released the region; it has if it does not know the region."""
    try:
        yield Call(region.unregister(), _CLOSE_TIMEOUT)
    except RegionInUse:
        return False
    except ServerError as error:
        _log.debug("region %s was not unregistered: %s", region.name, error)
    return True


def _not_shared(kind: str, error: ServerError) -> TransportError:
    return TransportError(
        f"the server cannot use shared_memory={kind!r}: {error}; it must run on this host, as this "
        f"user, and share {'/dev/shm (docker run --ipc=host)' if kind == 'system' else 'the GPU'}; "
        "omit shared_memory otherwise"
    )


def _large(inputs: Mapping[str, Array | InSharedMemory]) -> Iterator[tuple[str, Array]]:
    for name, value in inputs.items():
        if (
            isinstance(value, np.ndarray)
            and value.dtype != np.object_
            and value.nbytes >= MIN_SHARED_BYTES
        ):
            yield name, value


def _padded(nbytes: int) -> int:
    return -(-nbytes // 64) * 64  # each tensor starts on a cache line


def _round_up(size: int) -> int:
    return -(-size // _REGION_GRANULARITY) * _REGION_GRANULARITY


def _place(region: Region, arrays: Mapping[str, Array]) -> dict[str, InSharedMemory]:
    placed, offset = {}, 0
    for name, array in arrays.items():
        placed[name] = InSharedMemory(region.name, array.shape, array.nbytes, offset)
        offset += _padded(array.nbytes)
    region.write({placed[name].offset: array for name, array in arrays.items()})
    return placed


def _sweep(kind: Kind, retries: Retries) -> Flow[None]:
    """Have the server unmap what dead or closed clients left, and remove the files of dead ones."""
    sweep_files()
    try:
        known = yield from retries.send(Query(f"get_{kind}_shared_memory_status"))
        for name in _region_names(known):
            if is_abandoned(name):
                with suppress(RegionInUse):  # its request outlives it: the next client sweeps it
                    yield from retries.send(Query(f"unregister_{kind}_shared_memory", (name,)))
    except ServerError as error:  # a proxy may allow registering but not listing
        _log.debug("regions of dead clients were not swept: %s", error)


def _region_names(known: Any) -> Iterator[str]:
    """HTTP returns a list of regions, gRPC a mapping that is empty if there are none."""
    regions = known if isinstance(known, list) else known.get("regions", {}).values()
    return (region["name"] for region in regions)
