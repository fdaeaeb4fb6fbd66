"""The blocking client: performs the engine's flows step by step."""

import os
import threading
import weakref
from collections.abc import Generator, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from .endpoint import DEFAULT_URL, TLS, Endpoint, validate_headers
from .engine import Engine, Options, Prompts, gather_prompts
from .flow import Flow
from .geometry import ImageLike
from .lifetime import closed_error, forked_error
from .many import Outcome, attempt, jobs, run
from .prompts import BoxesLike, PointsLike, Prompt
from .regions import Kind
from .results import Segmentation
from .retry import DEFAULT_TIMEOUT, Retries, check_timeout
from .status import ServerStatus, status
from .steps import perform
from .transports import LoopThread, Transport, open_transport
from .view import Session, View

T = TypeVar("T")


class Client:
    """A client of a Triton server that serves `sam3_interactive`. Thread-safe.

    An instance belongs to the process that created it: after a fork, create one in the child.

    url: ``grpc://host:8001``, ``http://host:8000[/path]``, or ``grpcs://`` and ``https://`` for
        TLS. Nothing is sent before the first call. Proxy environment variables, such as
        http_proxy, are ignored. Over HTTP, redirects are not followed, and compressed answers are
        rejected.
    headers: sent with every request, for example ``{"authorization": "Bearer …"}``. Those that say
        how a request is sent, such as Content-Length and Host, are rejected.
    timeout: seconds a call may take, with all its requests, retries and waits for other calls; for
        `segment_many`, each image. Decoding and resizing an image count but are not interrupted.
    retries: how often a request is retried when the server is unreachable or busy. A request that
        a proxy rejects (status 429) is retried until `timeout`, unless this is 0.
    shared_memory: "system" passes images to a server on the same host through shared memory
        instead of the connection, "cuda" through memory of the GPU they share. For ``python -m
        server`` on loopback: beyond that, and in the container, the server refuses it.
    remember_images: how many images the client remembers by content, so that segmenting one again
        sends no pixels; 0 turns this off.
    root_certificates, private_key, certificate_chain: PEM files for TLS; the last two go together.
        Without root_certificates, the system's certificate authorities are trusted, or those in
        SSL_CERT_FILE.

    Raises ValueError for an invalid URL, header, number or PEM file, and TransportError if this
    machine does not support the requested shared memory. Methods raise only `SAM3Error`s, except
    that `segment_many` raises ValueError for a `concurrency` below 1.
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
        self._timeout = check_timeout(timeout)
        self._engine = Engine(Retries(retries), remember_images, shared_memory, threading.Lock)
        self._transport = open_transport(endpoint, validate_headers(headers))
        self._process = os.getpid()
        # Also runs when an unclosed client is garbage-collected, or at interpreter exit.
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
        """Segment objects in an image: one per box, then the one that the points mark.

        image: a path, the bytes of an image file, a file open in binary mode, a PIL image, or an
            RGB uint8 array [H, W, 3]. The EXIF orientation of paths, bytes and open files is
            applied; PIL images and arrays are used as they are.
        points: labelled points of one object in absolute pixels: ``{"x", "y", "positive"}``,
            ``(x, y)`` or ``(x, y, positive)``. x runs from 0 to the width and y from 0 to the
            height, both inclusive: the edges of the image.
        boxes: boxes in absolute pixels, one object each: an array [n, 4] of x_min, y_min, x_max,
            y_max; dicts, `Box` (also `Box.from_xywh`), Roboflow predictions or
            `supervision.Detections`. A box is clipped to the image, which Meta's predictor does
            not do. Empty boxes without points give an empty result without a request.
        prompts: instead of points and boxes, one `Prompt` per object, with any mix of points, box
            and mask.
        threshold: masks with a lower predicted IoU are dropped.
        multimask_output: for every object of the call, true lets the model propose three masks and
            keeps the one with the highest predicted IoU. This suits a single click, which may be
            ambiguous; for several points, for boxes and for masks to refine, SAM's authors
            recommend false. Use one call for each kind: a known image is not encoded again.

        Raises ImageError if the image cannot be read, and PromptError for an invalid prompt, such
        as a point or a whole box outside the image, both before the image is sent; ServerError or
        TransportError if the request fails.
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
    ) -> Generator[Outcome, None, None]:
        """Segment many images concurrently, yielding one `Outcome` per image.

        images: consumed one by one, at most `concurrency` ahead of the outcomes. An array must not
            be refilled before its outcome.
        prompts: ``{"points": …, "boxes": …}`` for every image, or an iterable with one entry per
            image: such a mapping, a list of `Prompt`, or a `supervision.Detections`.
        concurrency: images in flight at the same time. A proxy admits two new images per server;
            further ones wait their turn, within `timeout`.
        in_order: yield in the order of the images; false yields each as soon as it is done.

        An image that cannot be segmented gives an outcome with its error and does not stop the
        others. An error raised by `images` or `prompts` themselves follows the outcomes of all
        earlier images. Images are not kept on the server, except one with more prompts than fit
        in a request. Stopping early, as with Ctrl-C, leaves images in flight, and Python waits for
        them at its exit unless the client is closed: use it in a ``with`` block of the client.
        """
        options = Options(threshold, multimask_output)

        def segment(image: ImageLike, chosen: Prompts) -> Segmentation:
            return self._run(self._engine.segment(image, chosen, options, keep=False))

        work = jobs(images, prompts, concurrency)
        return run(work, partial(attempt, segment=segment), concurrency, in_order)

    def status(self) -> ServerStatus:
        """Return the server's version, its models and their sizes."""
        return self._run(status(self._engine, self.url))

    def open(self, image: ImageLike) -> View:
        """Encode an image and keep it on the server, so that clicks on it send no pixels.

        image: as for `segment`, with the same errors.
        """
        picture, slot = self._run(self._engine.open(image))
        return View(Session(self._engine, picture, slot), self._run)

    def close(self) -> None:
        """Close the connections. Images kept on the server expire by themselves."""
        self._finalizer()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, flow: Flow[T]) -> T:
        if not self._finalizer.alive:
            raise closed_error(self.url)
        if os.getpid() != self._process:
            raise forked_error(self.url)
        return perform(flow, self._transport, self._timeout)


def _close(engine: Engine, transport: Transport, process: int) -> None:
    """Holds no reference to the client, which may be gone already."""
    if os.getpid() != process:  # in a forked child, all of it belongs to the parent
        return
    if isinstance(threading.current_thread(), LoopThread):  # called by a garbage collection there
        threading.Thread(target=_close, args=(engine, transport, process)).start()
        return
    try:
        perform(engine.close(), transport)
    finally:
        transport.close()
