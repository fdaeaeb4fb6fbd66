"""The asyncio client: awaits the same flows that `Client` performs."""

import asyncio
import os
import weakref
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Mapping,
)
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from .endpoint import DEFAULT_URL, TLS, Endpoint, validate_headers
from .engine import Engine, Options, Prompts, gather_prompts
from .flow import Flow
from .geometry import ImageLike
from .lifetime import closed_error, forked_error, wrong_loop_error
from .many import Outcome, attempt_async, jobs, run_async
from .prompts import BoxesLike, PointsLike, Prompt
from .regions import Kind
from .results import Segmentation
from .retry import DEFAULT_TIMEOUT, Retries, check_timeout
from .status import ServerStatus, status
from .steps import perform_async
from .transports import AsyncTransport, open_async_transport
from .view import Session

T = TypeVar("T")
Run = Callable[[Flow[Any]], Coroutine[Any, Any, Any]]


class AsyncClient:
    """An asyncio `Client`, with the same arguments and the same methods, which are awaited.

    Only `segment_many` is not awaited but iterated over with ``async for``.

    An instance belongs to one event loop. Decoding, resizing and mask post-processing run in
    threads, so they do not block the loop.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        retries: int = 4,
        shared_memory: Kind | None = None,
        remember_images: int = 32,
        root_certificates: str | Path | None = None,
        private_key: str | Path | None = None,
        certificate_chain: str | Path | None = None,
    ) -> None:
        tls = TLS(root_certificates, private_key, certificate_chain)
        self._endpoint = Endpoint.parse(url, tls)
        self.url = self._endpoint.url
        self._headers = validate_headers(headers)
        self._timeout = check_timeout(timeout)
        self._engine = Engine(Retries(retries), remember_images, shared_memory, asyncio.Lock)
        self._transport: AsyncTransport | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process = os.getpid()
        self._closed = False
        # The next client of this process has the server release what one that was not closed used.
        abandon = weakref.finalize(self, _abandon, self._engine, self._process)
        abandon.atexit = False

    async def segment(
        self,
        image: ImageLike,
        points: PointsLike | None = None,
        boxes: BoxesLike | None = None,
        *,
        prompts: Prompt | Iterable[Prompt] | None = None,
        threshold: float = 0.0,
        multimask_output: bool = True,
    ) -> Segmentation:
        """See `Client.segment`."""
        chosen = gather_prompts(points, boxes, prompts)
        options = Options(threshold, multimask_output)
        return await self._run(self._engine.segment(image, chosen, options))

    def segment_many(
        self,
        images: Iterable[ImageLike],
        prompts: Any,
        *,
        threshold: float = 0.0,
        multimask_output: bool = True,
        concurrency: int = 8,
        in_order: bool = True,
    ) -> AsyncGenerator[Outcome, None]:
        """See `Client.segment_many`; use ``async for outcome in client.segment_many(…)``.

        Closing the generator, as ``contextlib.aclosing`` does, cancels the images in flight;
        leaving the loop early does not.
        """
        options = Options(threshold, multimask_output)

        def segment(image: ImageLike, chosen: Prompts) -> Awaitable[Segmentation]:
            return self._run(self._engine.segment(image, chosen, options, keep=False))

        work = jobs(images, prompts, concurrency)
        return run_async(work, partial(attempt_async, segment=segment), concurrency, in_order)

    async def status(self) -> ServerStatus:
        """See `Client.status`."""
        return await self._run(status(self._engine, self.url))

    def open(self, image: ImageLike) -> "Opening":
        """See `Client.open`; use ``async with client.open(image) as view``, or ``await`` it."""
        return Opening(self._open(image))

    async def _open(self, image: ImageLike) -> "AsyncView":
        picture, slot = await self._run(self._engine.open(image))
        return AsyncView(Session(self._engine, picture, slot), self._run)

    async def close(self) -> None:
        """See `Client.close`."""
        if self._transport is None or self._closed or os.getpid() != self._process:
            self._closed = True
            return
        assert self._loop is not None
        if self._loop is not asyncio.get_running_loop() and not self._loop.is_closed():
            raise wrong_loop_error(self.url)
        self._closed = True
        try:
            await perform_async(self._engine.close(), self._transport)
        finally:
            await self._transport.close()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, flow: Flow[T]) -> T:
        if self._closed:
            raise closed_error(self.url)
        if os.getpid() != self._process:
            raise forked_error(self.url)
        loop = asyncio.get_running_loop()
        if self._transport is None:  # created here, in the event loop it belongs to
            self._transport = open_async_transport(self._endpoint, self._headers)
            self._loop = loop
        if loop is not self._loop:
            raise wrong_loop_error(self.url)
        return await perform_async(flow, self._transport, self._timeout)


def _abandon(engine: Engine, process: int) -> None:
    if os.getpid() == process:  # in a forked child, all of it belongs to the parent
        engine.abandon()


class Opening(Coroutine[Any, Any, "AsyncView"]):
    """An image being opened: await it, make a task of it, or use it with ``async with``."""

    def __init__(self, work: Coroutine[Any, Any, "AsyncView"]) -> None:
        self._work = work
        self._view: AsyncView | None = None

    def __await__(self) -> Generator[Any, Any, "AsyncView"]:
        return self._work.__await__()

    def send(self, value: Any) -> Any:
        """With `throw` and `close`, what asyncio needs to make a task of a coroutine."""
        return self._work.send(value)

    def throw(self, *error: Any) -> Any:
        return self._work.throw(*error)

    def close(self) -> None:
        self._work.close()

    async def __aenter__(self) -> "AsyncView":
        self._view = await self._work
        return self._view

    async def __aexit__(self, *_: object) -> None:
        if self._view is not None:
            await self._view.close()


class AsyncView:
    """An asyncio `View`. Concurrent clicks are answered in the order in which they were made."""

    def __init__(self, session: Session, run: Run) -> None:
        self._session = session
        self._run = run

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the image in pixels."""
        return self._session.size

    async def segment(
        self,
        points: PointsLike | None = None,
        boxes: BoxesLike | None = None,
        *,
        prompts: Prompt | Iterable[Prompt] | None = None,
        threshold: float = 0.0,
        multimask_output: bool = True,
    ) -> Segmentation:
        """See `View.segment`."""
        options = Options(threshold, multimask_output)
        flow = self._session.segment(points, boxes, prompts, options)
        result: Segmentation = await self._run(flow)
        return result

    async def click(self, x: float, y: float, positive: bool = True) -> Segmentation:
        """See `View.click`."""
        result: Segmentation = await self._run(self._session.click(x, y, positive))
        return result

    async def undo(self) -> Segmentation:
        """See `View.undo`."""
        result: Segmentation = await self._run(self._session.undo())
        return result

    async def redo(self) -> Segmentation:
        """See `View.redo`."""
        result: Segmentation = await self._run(self._session.redo())
        return result

    async def reset(self) -> Segmentation:
        """See `View.reset`."""
        result: Segmentation = await self._run(self._session.reset())
        return result

    async def close(self) -> None:
        """See `View.close`."""
        self._session.closed = True

    async def __aenter__(self) -> "AsyncView":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
