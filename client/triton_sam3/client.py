"""The blocking client: performs the engine's flows step by step."""

import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from .endpoint import DEFAULT_URL, TLS, Endpoint, checked_headers
from .engine import Engine, Options, Prompts, gather_prompts
from .flow import Flow
from .geometry import ImageLike
from .lifetime import closed, forked
from .many import Outcome, attempt, jobs, run
from .prompts import BoxesLike, PointsLike, Prompt
from .regions import Kind
from .results import Segmentation
from .retry import DEFAULT_TIMEOUT, Retries
from .status import ServerStatus, status
from .steps import perform
from .transports import LoopThread, Transport, open_transport
from .view import Session, View

T = TypeVar("T")


class Client:
    """A connection to a Triton server that serves `sam3_interactive`. Safe to use from threads.

    Belongs to the process that made it: after a fork, make one in the child.

    url: ``grpc://host:8001``, ``http://host:8000[/path]``, or ``grpcs://`` and ``https://`` for
        TLS. Nothing is sent before the first call. Proxies named in the environment, such as
        http_proxy, are not used.
    headers: sent with every request, for example ``{"authorization": "Bearer …"}``.
    timeout: seconds a request may take, its retries included.
    retries: how often a request is sent again when the server cannot be reached or is busy. What a
        proxy refuses (status 429) is sent again until `timeout`, unless this is 0.
    shared_memory: "system" passes images to a server of the same host through shared memory
        instead of the connection, "cuda" through memory of the GPU they share.
    remember_images: how many images the client knows by content, so that asking about one again
        sends no pixels; 0 turns it off.
    root_certificates, private_key, certificate_chain: PEM files for TLS, the last two together.
        Without the first the system's authorities are trusted, or those of SSL_CERT_FILE.

    Raises ValueError for a URL, header, number or PEM file it cannot use, and TransportError where
    this machine has no such shared memory. Methods raise `SAM3Error`s only, but for `segment_many`
    a ValueError for a `concurrency` below 1.
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
        endpoint = Endpoint.parse(url, tls)
        self.url = endpoint.url
        self._engine = Engine(
            Retries(retries, timeout), remember_images, shared_memory, threading.Lock
        )
        self._transport = open_transport(endpoint, checked_headers(headers))
        self._process = os.getpid()
        # Also when a client is dropped unclosed, and at the latest when the interpreter exits.
        self._finalizer = weakref.finalize(
            self, _close, self._engine, self._transport, self._process
        )

    def segment(
        self,
        image: ImageLike,
        points: PointsLike | None = None,
        boxes: BoxesLike | None = None,
        *,
        prompts: Prompt | Iterable[Prompt] | None = None,
        threshold: float = 0.0,
        multimask_output: bool = True,
    ) -> Segmentation:
        """Segment objects in an image; boxes come first, then the object the points mark.

        image: a path, a PIL image, or RGB uint8 [H, W, 3]. A file's EXIF orientation is applied; a
            PIL image and an array are taken as they stand.
        points: labelled points of one object in absolute pixels: ``{"x", "y", "positive"}``,
            ``(x, y)`` or ``(x, y, positive)``.
        boxes: xyxy boxes in absolute pixels, one object each: an array, dicts, Roboflow
            predictions or `supervision.Detections`. A box is clipped to the image, which Meta's
            predictor does not do. Empty boxes alone give an empty result without a call.
        prompts: instead of both, any mix of points, box and mask, one `Prompt` an object.
        threshold: masks whose predicted IoU is lower are dropped.
        multimask_output: let the model propose three masks an object and take the best by
            predicted IoU; better for a single click, which may mean several things.

        Raises, before anything is sent, ImageError, and PromptError (also for a point or a whole
        box outside the image); then ServerError and TransportError.
        """
        chosen = gather_prompts(points, boxes, prompts)
        options = Options(threshold, multimask_output)
        return self._run(self._engine.segment(image, chosen, options))

    def segment_many(
        self,
        images: Iterable[ImageLike],
        prompts: Any,
        *,
        threshold: float = 0.0,
        multimask_output: bool = True,
        concurrency: int = 8,
        in_order: bool = True,
    ) -> Iterator[Outcome]:
        """Segment many images at once, and yield one `Outcome` for each.

        images: taken one by one, as many as are at work.
        prompts: ``{"points": …, "boxes": …}`` for every image, or an iterable with one per image:
            such a mapping, a list of `Prompt`, or a `supervision.Detections`.
        concurrency: images at work at the same time. A proxy lets in two new images for each
            server; further ones wait their turn, within `timeout`.
        in_order: as the images come; false yields each as soon as it is done.

        An image that cannot be segmented is an outcome with its error and stops nothing. What
        `images` or `prompts` themselves raise comes after the outcomes of all images before. The
        images are not kept on the server.
        """
        options = Options(threshold, multimask_output)

        def segment(image: ImageLike, chosen: Prompts) -> Segmentation:
            return self._run(self._engine.segment(image, chosen, options, keep=False))

        work = jobs(images, prompts, concurrency)
        return run(work, partial(attempt, segment=segment), concurrency, in_order)

    def status(self) -> ServerStatus:
        """Ask the server for its version, its models and their sizes."""
        return self._run(status(self._engine, self.url))

    def open(self, image: ImageLike) -> View:
        """Have the server encode and keep an image, to click on it without sending it again."""
        picture, slot = self._run(self._engine.open(image))
        return View(Session(self._engine, picture, slot), self._run)

    def close(self) -> None:
        """Close the connections. Images the server keeps grow old and leave by themselves."""
        self._finalizer()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, flow: Flow[T]) -> T:
        if not self._finalizer.alive:
            raise closed(self.url)
        if os.getpid() != self._process:
            raise forked(self.url)
        return perform(flow, self._transport)


def _close(engine: Engine, transport: Transport, process: int) -> None:
    """Knows nothing of the client, so that it may be gone already."""
    if os.getpid() != process:  # in a forked child all of it is the parent's
        return
    if isinstance(threading.current_thread(), LoopThread):  # by a garbage collection there
        threading.Thread(target=_close, args=(engine, transport, process)).start()
        return
    try:
        perform(engine.close(), transport)
    finally:
        transport.close()
