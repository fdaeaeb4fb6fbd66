"""The client's logic without its I/O: every public call as a flow of requests (see flow.py).

image ─► Picture ─► its slot ─┬─ id unknown: send the pixels, have them kept, note the id
                              └─ id known:   send the id (lost? forget it, send the pixels)
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from . import contract
from .errors import ClientUnusable, ImageNotKept, InvalidRequest, PromptError
from .flow import Acquire, Compute, Flow, Infer, Lock, Query
from .geometry import ImageLike, load_image, resize
from .kept import ImageMemory, ImageSlot
from .parsing import parse_bool, parse_threshold
from .prompts import PackedPrompts, Prompt, pack, to_prompts
from .protocol import (
    Answer,
    Flags,
    ServedModel,
    click_request,
    digest,
    image_request,
    keep_request,
    read_answer,
    read_image_id,
)
from .regions import Kind
from .results import Segmentation
from .retry import Retries, check_count
from .shared_memory import SharedMemory

Prompts = Sequence[Prompt]

_TRIES_BY_ID = 2
"""The second in case another caller has replaced a lost id; after that, the image is sent."""


@dataclass(frozen=True)
class Options:
    """The options of a request; see `Client.segment`.

    Raises PromptError for a threshold that is not a number and a flag that is not a boolean.
    """

    threshold: float = 0.0
    multimask_output: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", parse_threshold(self.threshold))
        multimask_output = parse_bool(self.multimask_output, "multimask_output")
        object.__setattr__(self, "multimask_output", multimask_output)


def gather_prompts(points: Any, boxes: Any, prompts: Prompt | Iterable[Prompt] | None) -> Prompts:
    """One sequence of prompts, from either of the two ways to pass them."""
    if prompts is None:
        return to_prompts(points, boxes)
    if points is not None or boxes is not None:
        raise PromptError("give either prompts, or points and boxes; a Prompt can hold both")
    several = not isinstance(prompts, Prompt) and isinstance(prompts, Iterable)
    given: Any = prompts if several else (prompts,)
    chosen = tuple(given)
    for prompt in chosen:
        if not isinstance(prompt, Prompt):
            raise PromptError(f"prompts must be Prompt values, got {prompt!r}")
    return chosen


def finish(
    answers: Sequence[Answer], prompts: Prompts, picture: "Picture", threshold: float
) -> Segmentation:
    """Build the masks of a picture from its answers, in the order of the prompts."""
    if answers:
        logits = np.concatenate([answer.logits for answer in answers])
        scores = np.concatenate([answer.scores for answer in answers])
    else:
        logits, scores = np.empty((0, 0, 0), np.float16), np.empty(0, np.float32)
    size = (picture.width, picture.height)
    return Segmentation.from_logits(logits, scores, prompts, size, threshold=threshold)


class Picture:
    """An image to be sent: its size, content digest, and the pixels that the server accepts."""

    def __init__(self, image: ImageLike) -> None:
        source = load_image(image)
        if isinstance(image, np.ndarray) and np.may_share_memory(source, image):
            source = source.copy()  # the caller may refill it with the next frame from now on
        self._source: npt.NDArray[np.uint8] | None = source
        self.height, self.width = source.shape[:2]
        self.digest = digest(source)
        self._pixels: npt.NDArray[np.uint8] | None = None

    def pixels(self, side: int) -> npt.NDArray[np.uint8]:
        """RGB [side, side, 3]. Made once; the original is released.

        Raises ClientUnusable for a side other than the first call's, which needs the original.
        """
        if self._pixels is None:
            assert self._source is not None
            self._pixels, self._source = resize(self._source, side), None
        if len(self._pixels) != side:
            raise ClientUnusable(
                f"this image was opened for a model of {len(self._pixels)}×{len(self._pixels)} "
                f"pixels, and the server now has one of {side}×{side}: open the image again"
            )
        return self._pixels

    def pack(self, prompts: Prompts, served: ServedModel, first: int = 0) -> PackedPrompts:
        """Pack prompts for the wire; PromptError for one that does not fit picture or server.

        first: the index of the first of them among all prompts of the call.
        """
        return pack(
            prompts,
            self.width,
            self.height,
            served.mask_side,
            max_tokens=served.max_tokens,
            first=first,
        )


class Engine:
    """The state behind one client (what the server serves, which images it keeps) and its flows."""

    def __init__(
        self,
        retries: Retries,
        remember_images: int,
        shared_memory: Kind | None,
        make_lock: Callable[[], Lock],
    ) -> None:
        check_count("remember_images", remember_images)
        self.retries = retries
        self.make_lock = make_lock
        self._memory = ImageMemory(remember_images, make_lock)
        self._remembers = remember_images > 0
        self._shared_memory = SharedMemory(shared_memory) if shared_memory else None
        self._served: ServedModel | None = None

    def served(self) -> Flow[ServedModel]:
        """The server's configuration, queried once, and again after it has rejected a request."""
        served = self._served  # another thread may have it forgotten at any time
        if served is None:
            interactive = yield from self._config(contract.INTERACTIVE)
            decoder = yield from self._config(contract.DECODER)
            served = self._served = ServedModel.from_configs(interactive, decoder)
        return served

    def forget_served(self) -> None:
        """Query the server's configuration again before it is used next."""
        self._served = None

    def _config(self, model: str) -> Flow[dict[str, Any]]:
        config = yield from self.retries.send(Query("get_model_config", (model,)))
        inner = config.get("config", config)  # gRPC wraps what HTTP returns bare
        return inner if isinstance(inner, dict) else {}

    def open(self, image: ImageLike) -> Flow[tuple[Picture, ImageSlot]]:
        """Have the server keep the image, unless it is known to keep it already."""
        picture = yield Compute(lambda: Picture(image))
        slot = self._memory.slot(picture.digest)
        yield from self._keep(picture, slot)
        return picture, slot

    def segment(
        self, image: ImageLike, prompts: Prompts, options: Options, *, keep: bool = True
    ) -> Flow[Segmentation]:
        """Masks for any number of prompts.

        keep: false leaves the image on the server only if the prompts need several requests.
        """
        picture = yield Compute(lambda: Picture(image))
        remembered = keep and self._remembers and prompts
        slot = self._memory.slot(picture.digest) if remembered else None
        return (yield from self.segment_picture(picture, slot, prompts, options))

    def segment_picture(
        self, picture: Picture, slot: ImageSlot | None, prompts: Prompts, options: Options
    ) -> Flow[Segmentation]:
        """Send as many requests as the server's limit requires, all on one encoding."""
        if not prompts:
            return finish([], prompts, picture, options.threshold)
        served = yield from self.served()
        limit = served.max_objects
        if slot is None and len(prompts) > limit:
            slot = ImageSlot(self.make_lock())
        flags = Flags(multimask_output=options.multimask_output)
        # All are packed before any is sent, so that an invalid prompt costs no request.
        starts = range(0, len(prompts), limit)
        packed = [picture.pack(prompts[start : start + limit], served, start) for start in starts]
        answers: list[Answer] = []
        for batch in packed:
            answers.append((yield from self.ask(picture, slot, batch, flags)))
        result: Segmentation = yield Compute(
            lambda: finish(answers, prompts, picture, options.threshold)
        )
        return result

    def ask(
        self, picture: Picture, slot: ImageSlot | None, packed: PackedPrompts, flags: Flags
    ) -> Flow[Answer]:
        """Send one request, by id if the slot has one; without a slot the image is not kept."""
        served = yield from self.served()

        def by_pixels() -> Flow[Any]:
            pixels = yield Compute(lambda: picture.pixels(served.image_side))
            sent = Flags(flags.multimask_output, keep_image=slot is not None)
            return (yield from self._infer(image_request(pixels, picture.digest, packed, sent)))

        def by_id(image_id: bytes) -> Flow[Any]:
            request = click_request(image_id, picture.digest, packed, flags)
            return (yield from self._infer(request))

        if slot is None:
            outputs = yield from by_pixels()
        else:
            outputs = yield from _by_id_or_pixels(slot, by_id, by_pixels)
        return read_answer(outputs, len(packed.point_labels))

    def _keep(self, picture: Picture, slot: ImageSlot) -> Flow[None]:
        """Fill an empty slot. A request needs a prompt, so this one has a point in the centre."""
        served = yield from self.served()
        centre = Prompt(points=[(picture.width / 2, picture.height / 2)])
        packed = picture.pack([centre], served)
        pixels = yield Compute(lambda: picture.pixels(served.image_side))
        yield Acquire(slot.lock)
        try:
            if slot.image_id is None:
                outputs = yield from self._infer(keep_request(pixels, picture.digest, packed))
                slot.fill(read_image_id(outputs))
        finally:
            slot.lock.release()

    def _infer(self, request: Infer) -> Flow[dict[str, npt.NDArray[Any]]]:
        send = self._shared_memory.send if self._shared_memory else _send_inline
        try:
            outputs: dict[str, npt.NDArray[Any]] = yield from send(request, self.retries)
        except InvalidRequest:
            self.forget_served()  # another export may be served by now
            raise
        return outputs

    def close(self) -> Flow[None]:
        """Have the server release this client's shared memory."""
        if self._shared_memory is not None:
            yield from self._shared_memory.close()

    def abandon(self) -> None:
        """Leave this client's shared memory to the next client, without a request."""
        if self._shared_memory is not None:
            self._shared_memory.abandon()


def _send_inline(request: Infer, retries: Retries) -> Flow[Any]:
    return (yield from retries.send(request))


def _by_id_or_pixels(
    slot: ImageSlot,
    by_id: Callable[[bytes], Flow[Any]],
    by_pixels: Callable[[], Flow[Any]],
) -> Flow[Any]:
    """Ask by id if there is one; otherwise one caller sends the pixels and the others wait.

    If the server keeps no images there is nothing to wait for: each caller sends the pixels.
    """

    def fill_slot() -> Flow[Any]:
        outputs = yield from by_pixels()
        slot.fill(read_image_id(outputs))
        return outputs

    for _ in range(_TRIES_BY_ID):
        image_id = slot.image_id
        if image_id is None and not slot.declined:
            yield Acquire(slot.lock)
            try:
                image_id = slot.image_id
                if image_id is None and not slot.declined:
                    return (yield from fill_slot())
            finally:
                slot.lock.release()
        if image_id is None:
            break
        try:
            return (yield from by_id(image_id))
        except ImageNotKept:
            slot.forget(image_id)
    return (yield from fill_slot())
