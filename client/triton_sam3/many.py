"""Many images at once: a window of requests in flight slides over them.

    images, prompts ─► Job… ─► at most `concurrency` in flight ─► Outcome…, in order or as completed

An image that fails gives an outcome with an error; the others go on. Images are taken from the
iterable only as the window reaches them, and outcomes wait only within the window. An error raised
by an iterable is raised again once the window is empty: requests in flight are answered first.
"""

import asyncio
import os
import traceback
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sized,
)
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
from PIL import Image

from .engine import Prompts, gather_prompts
from .errors import ImageError, PromptError
from .geometry import ImageLike
from .prompts import Prompt
from .results import Segmentation
from .retry import check_count


@dataclass(frozen=True, eq=False)
class Outcome:
    """The outcome for one image: either `result` or `error` is set.

    index: the image's index among the images, from 0; image: as it was passed.
    """

    index: int
    image: ImageLike
    result: Segmentation | None = None
    error: Exception | None = None

    def unwrap(self) -> Segmentation:
        """Return the result, or raise the error if there is one instead."""
        if self.result is None:
            raise self.error or AssertionError("an outcome has a result or an error")
        return self.result


@dataclass(frozen=True, eq=False)
class Job:
    """One image with its prompts, as they were passed."""

    index: int
    image: ImageLike
    raw_prompts: Any

    def prompts(self) -> Prompts:
        """The parsed prompts of this image; raises PromptError if they are invalid."""
        raw = self.raw_prompts
        if hasattr(raw, "xyxy"):  # a detector's boxes, without points
            return gather_prompts(None, raw, None)
        if isinstance(raw, Mapping):
            if set(raw) - {"points", "boxes"}:
                raise PromptError(f"prompts {raw!r} have an unknown key; use 'points' and 'boxes'")
            return gather_prompts(raw.get("points"), raw.get("boxes"), None)
        return gather_prompts(None, None, raw)


def jobs(images: Iterable[ImageLike], prompts: Any, concurrency: int) -> Iterator[Job]:
    """Pair images with prompts; a single mapping applies to every image.

    Raises early what can be checked early: ImageError for a single image, PromptError if the
    numbers of prompts and images differ, ValueError for a concurrency below 1.
    """
    check_count("concurrency", concurrency, at_least=1)
    if _is_one_image(images):
        raise ImageError(
            f"images must be an iterable of images, not a {type(images).__name__}; wrap a single "
            "image in a list"
        )
    if isinstance(prompts, Mapping):  # read anew for every image
        prompts = {k: list(v) if isinstance(v, Iterator) else v for k, v in prompts.items()}
    if isinstance(prompts, Mapping | Prompt):
        return _pair(images, repeat(prompts))
    if not isinstance(prompts, Iterable):
        raise PromptError(
            f"prompts must be one mapping for all images, or one entry per image, got {prompts!r}"
        )
    known = len(prompts) if isinstance(prompts, Sized) else None
    if isinstance(images, Sized) and known is not None and known != len(images):
        raise _count_mismatch(known, len(images))
    return _pair(images, iter(prompts), known)


def _is_one_image(images: Any) -> bool:
    """Whether iterating is impossible or would give characters, bytes, lines or rows of pixels."""
    if isinstance(images, np.ndarray):
        return images.ndim < 4
    single = (str, bytes, bytearray, memoryview, os.PathLike, Image.Image)
    if isinstance(images, single) or hasattr(images, "read"):
        return True
    # A dataset may have no more than __getitem__, which is enough to iterate over it.
    return not (hasattr(images, "__iter__") or hasattr(images, "__getitem__"))


def _pair(
    images: Iterable[ImageLike], prompts: Iterator[Any], known: int | None = None
) -> Iterator[Job]:
    """known: the number of prompts, if it is known."""
    index = -1
    for index, image in enumerate(images):
        try:
            raw_prompts = next(prompts)
        except StopIteration:
            raise _count_mismatch(index, "more") from None
        yield Job(index, image, raw_prompts)
    if known is not None and known != index + 1:
        raise _count_mismatch(known, index + 1)


def _count_mismatch(prompts: int, images: int | str) -> PromptError:
    return PromptError(
        f"got prompts for {prompts} images, but {images} images: pass one entry of prompts per "
        "image, or one mapping for all images"
    )


def attempt(job: Job, segment: Callable[[ImageLike, Prompts], Segmentation]) -> Outcome:
    """Segment one image; an error becomes part of its outcome."""
    try:
        return Outcome(job.index, job.image, segment(job.image, job.prompts()))
    except Exception as error:
        _forget_variables(error)
        return Outcome(job.index, job.image, error=error)


async def attempt_async(
    job: Job, segment: Callable[[ImageLike, Prompts], Awaitable[Segmentation]]
) -> Outcome:
    """`attempt`, awaited."""
    try:
        return Outcome(job.index, job.image, await segment(job.image, job.prompts()))
    except Exception as error:
        _forget_variables(error)
        return Outcome(job.index, job.image, error=error)


def _forget_variables(error: BaseException | None) -> None:
    """Clear what an error's traceback keeps alive, such as the decoded image: callers collect
    failures, and pass paths so as not to hold the images."""
    seen: set[int] = set()  # chains may be circular
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def run(
    work: Iterator[Job], attempt_one: Callable[[Job], Outcome], concurrency: int, in_order: bool
) -> Generator[Outcome, None, None]:
    """Yield the outcomes of all jobs, run in threads, `concurrency` at a time.

    Stopping early, as with Ctrl-C, does not wait for the jobs in flight.
    """
    executor = ThreadPoolExecutor(concurrency, thread_name_prefix="triton-sam3")
    window: dict[Future[Outcome], None] = {}  # a dict keeps the order of submission
    try:
        while isinstance(job := _take(work), Job):
            window[executor.submit(attempt_one, job)] = None
            if len(window) >= concurrency:
                yield from _finished(window, in_order)
        while window:
            yield from _finished(window, in_order)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
    if not isinstance(job, StopIteration):
        raise job


def _take(work: Iterator[Job]) -> Job | Exception:
    """The next job, or why there is none: `StopIteration`, or an error of images or prompts."""
    try:
        return next(work)
    except Exception as error:
        return error


def _finished(window: dict[Future[Outcome], None], in_order: bool) -> Iterator[Outcome]:
    """Wait for the oldest job, or for any, and remove it from the window."""
    ready = [next(iter(window))] if in_order else wait(window, return_when=FIRST_COMPLETED).done
    for future in ready:
        del window[future]
        yield future.result()


async def run_async(
    work: Iterator[Job],
    attempt_one: Callable[[Job], Awaitable[Outcome]],
    concurrency: int,
    in_order: bool,
) -> AsyncGenerator[Outcome, None]:
    """`run` with tasks instead of threads."""
    window: dict[asyncio.Future[Outcome], None] = {}
    try:
        while isinstance(job := _take(work), Job):
            window[asyncio.ensure_future(attempt_one(job))] = None
            if len(window) >= concurrency:
                for outcome in await _finished_async(window, in_order):
                    yield outcome
        while window:
            for outcome in await _finished_async(window, in_order):
                yield outcome
    finally:
        for future in window:
            future.cancel()
        await asyncio.gather(*window, return_exceptions=True)
    if not isinstance(job, StopIteration):
        raise job


async def _finished_async(
    window: dict[asyncio.Future[Outcome], None], in_order: bool
) -> list[Outcome]:
    ready: Iterable[asyncio.Future[Outcome]] = [next(iter(window))]
    if not in_order:
        ready, _ = await asyncio.wait(window, return_when=asyncio.FIRST_COMPLETED)
    outcomes = [await future for future in ready]
    for future in ready:
        del window[future]
    return outcomes
