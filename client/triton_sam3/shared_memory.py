"""Tensors in memory that client and server share, instead of in the request.

    request ─► arrays copied into a region ─► server told where they are ─► region back in the pool
                  made once: create ─► register ─► unlink; from then on the mapping alone holds it

A region is free, busy (with a request, or being taken back), or lost: without an answer, the server
may still read it.

Nothing outlives its users. A region's file exists only from creation to registration, so a crash
leaves none behind but in that instant; what the server still has mapped for a dead process, and a
file of that instant, is swept by the next client, which knows its owner from the name. So is what a
closed client of the same process had to leave.
"""

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from .errors import SAM3Error, ServerError, TransportError
from .flow import Array, Flow, Infer, InSharedMemory, Query, Sleep
from .regions import (
    Kind,
    Region,
    check_available,
    give_up,
    is_abandoned,
    make_region,
    sweep_files,
)
from .retry import Retries
from .translation import RegionInUse, RegionLost

SMALLEST = 64 * 1024
"""Tensors of fewer bytes travel in the request: copying them costs less than naming a region."""

_GRAIN = 1 << 20
"""Regions are whole multiples of this, so that slightly different sizes share one."""

_MOST_REGIONS = 32
"""Regions a client holds at most, a request each; further requests at the same time go without."""

_FAREWELL = 5.0
"""Most seconds to wait for a server to let go of a region; closing must not hang."""

_STILL_READING = 0.01
"""Seconds until a server that still uses a region is asked again."""

_log = logging.getLogger(__name__)


class SharedMemory:
    """The regions of one client, and the flow that sends a request through one of them."""

    def __init__(self, kind: Kind) -> None:
        check_available(kind)
        self._kind = kind
        self._free: list[Region] = []
        self._busy: list[Region] = []
        self._lost: list[Region] = []
        self._guard = threading.Lock()
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
            self._forsake_all()
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
            with suppress(TransportError):  # who asks next tries again
                yield from self._forget_lost(retries)
            region = self._make(_grains(size))
            if region is not None:
                yield from self._register(region, retries)
        return region

    def _reuse(self, size: int) -> Region | None:
        with self._guard:
            for index, region in enumerate(self._free):
                if region.size >= size and not self._closed:
                    self._busy.append(region)
                    return self._free.pop(index)
        return None

    def _held(self) -> int:
        """How many regions there are; to be asked under the guard, as they change places."""
        return len(self._free) + len(self._busy) + len(self._lost)

    def _make(self, size: int) -> Region | None:
        with self._guard:
            if self._closed or self._held() >= _MOST_REGIONS:
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
            yield from retries.send(region.register())
            region.registered()
            yield from self._sweep(retries)
        except BaseException as error:
            # The server may have it all the same, unless it has said that it does not.
            self._put_back(region, self._lost)
            if isinstance(error, ServerError):
                raise _not_shared(self._kind, error) from error
            raise

    def _put_back(self, region: Region, place: list[Region] | None) -> None:
        """To its place; freed where it has none, or closing has given it up."""
        with self._guard:
            given_up = region not in self._busy
            if not given_up:
                self._busy.remove(region)
                if place is not None:
                    place.append(region)
                    return
        give_up(region) if given_up else region.close()

    def _forsake_all(self) -> None:
        """A server that lost one region has lost them all."""
        with self._guard:
            self._lost += self._free
            self._free.clear()

    def _sweep(self, retries: Retries) -> Flow[None]:
        """Once, and only when a region of ours has shown that the server is on this host: who is
        dead here tells nothing of another one."""
        with self._guard:
            sweep, self._swept = not self._swept, True
        if sweep:
            yield from _sweep(self._kind, retries)

    def close(self, retries: Retries) -> Flow[None]:
        """Take every region back from the server and free it.

        Requests under way are waited for, but not for ever, nor a server that does not answer.
        """
        self._closed = True
        end = retries.clock() + _FAREWELL
        while True:
            self._forsake_all()
            try:
                yield from self._forget_lost(retries)
            except TransportError:
                break
            with self._guard:
                if not self._held():
                    return
            if retries.clock() >= end:
                break
            yield Sleep(_STILL_READING)
        self._give_up()

    def _give_up(self) -> None:
        """Leave what the server still has to the next client; a busy region goes with its
        request."""
        with self._guard:
            lost, self._lost = self._lost, []
            self._busy.clear()
        for region in lost:
            give_up(region)

    def _forget_lost(self, retries: Retries) -> Flow[None]:
        """Unregister and free the lost regions, but for those that the server still uses.

        Raises TransportError at the first that brings no answer: the others would wait as long.
        """
        for _ in range(len(self._lost)):
            with self._guard:  # one at a time: a caller who gives up midway forgets none
                if not self._lost:
                    return
                region = self._lost.pop(0)
                self._busy.append(region)  # closing waits for this as well
            gone = False
            try:
                gone = yield from self._unregister(region, retries)
            finally:
                self._put_back(region, None if gone else self._lost)

    def _unregister(self, region: Region, retries: Retries) -> Flow[bool]:
        """Whether the server let go of the region; one that is gone has, by itself."""
        brief = replace(retries, attempts=0, timeout=min(retries.timeout, _FAREWELL))
        try:
            yield from brief.send(region.unregister())
        except RegionInUse:
            return False
        except ServerError as error:
            _log.debug("region %s is not unregistered: %s", region.name, error)
        return True


def _not_shared(kind: str, error: ServerError) -> TransportError:
    return TransportError(
        f"the server cannot use shared_memory={kind!r}: {error}; it must run on this host, as this "
        f"user, and share {'/dev/shm (docker run --ipc=host)' if kind == 'system' else 'the GPU'}; "
        "leave shared_memory out otherwise"
    )


def _large(inputs: Mapping[str, Array | InSharedMemory]) -> Iterator[tuple[str, Array]]:
    for name, value in inputs.items():
        if isinstance(value, np.ndarray) and value.dtype != np.object_ and value.nbytes >= SMALLEST:
            yield name, value


def _padded(nbytes: int) -> int:
    return -(-nbytes // 64) * 64  # each tensor starts on a cache line


def _grains(size: int) -> int:
    return -(-size // _GRAIN) * _GRAIN


def _place(region: Region, arrays: Mapping[str, Array]) -> dict[str, InSharedMemory]:
    placed, offset = {}, 0
    for name, array in arrays.items():
        placed[name] = InSharedMemory(region.name, array.shape, array.nbytes, offset)
        offset += _padded(array.nbytes)
    region.write({placed[name].offset: array for name, array in arrays.items()})
    return placed


def _sweep(kind: Kind, retries: Retries) -> Flow[None]:
    """Have the server unmap what dead or closed clients left, and remove the dead ones' files."""
    sweep_files()
    try:
        known = yield from retries.send(Query(f"get_{kind}_shared_memory_status"))
        for name in _region_names(known):
            if is_abandoned(name):
                with suppress(RegionInUse):  # its request outlives it: the next client's to sweep
                    yield from retries.send(Query(f"unregister_{kind}_shared_memory", (name,)))
    except ServerError as error:  # a proxy may allow registering and forbid looking at the list
        _log.debug("regions of dead clients are not swept: %s", error)


def _region_names(known: Any) -> Iterator[str]:
    """HTTP answers a list of regions, gRPC a mapping that is empty when there are none."""
    regions = known if isinstance(known, list) else known.get("regions", {}).values()
    return (region["name"] for region in regions)
