"""An image the server keeps, and the object being clicked on it.

click ─► all clicks so far + the logits of the last answer ─► one more `Clicked` on the pile
undo  ─► the pile without its top; the state before, exactly
"""

import uuid
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from .engine import Engine, Options, Picture, finish, gather_prompts
from .errors import ClientUnusable
from .flow import Acquire, Compute, Flow
from .kept import ImageSlot
from .parsing import Point
from .prompts import BoxesLike, PointsLike, Prompt
from .protocol import Answer, Flags
from .results import Segmentation

T = TypeVar("T")

_WHATEVER_SCORE = float("-inf")
"""A person who clicks wants to see the mask, however little the model thinks of it."""


@dataclass(frozen=True)
class Clicked:
    """The object after a click: all its points, and the answer.

    The masks at the image's size are a megabyte a megapixel, so they stay only as long as somebody
    else holds them; `undo` makes the same from the answer again.
    """

    prompt: Prompt
    answer: Answer
    shown: weakref.ref[Segmentation]


class Session:
    """What `View` and `AsyncView` share: the pile of clicks, and flows that take turns on it."""

    def __init__(self, engine: Engine, picture: Picture, slot: ImageSlot) -> None:
        self._engine = engine
        self._picture = picture
        self._slot = slot
        self._clicked: tuple[Clicked, ...] = ()
        self._turn = engine.make_lock()
        self.closed = False

    @property
    def size(self) -> tuple[int, int]:
        return self._picture.width, self._picture.height

    def segment(
        self, points: Any, boxes: Any, prompts: Prompt | Iterable[Prompt] | None, options: Options
    ) -> Flow[Segmentation]:
        self._check_open()
        chosen = gather_prompts(points, boxes, prompts)
        return self._engine.segment_picture(self._picture, self._slot, chosen, options)

    def click(self, x: float, y: float, positive: bool) -> Flow[Segmentation]:
        self._check_open()
        point = Prompt(points=[(x, y, positive)]).points[0]
        return self._in_turn(self._click(point))

    def undo(self) -> Flow[Segmentation]:
        return self._in_turn(self._drop(1))

    def reset(self) -> Flow[Segmentation]:
        return self._in_turn(self._drop(None))

    def _click(self, point: Point) -> Flow[Segmentation]:
        """The first click may mean a whole or a part, so the model proposes three masks; later
        ones refine the mask it already chose, as SAM is meant to be used."""
        last = self._clicked[-1] if self._clicked else None
        points = (*last.prompt.points, point) if last else (point,)
        prompt = Prompt(points=points, detection_id=str(uuid.uuid4()))
        refining = replace(prompt, mask=last.answer.logits[0]) if last else prompt
        flags = Flags(multimask_output=last is None)
        picture = self._picture
        served = yield from self._engine.served()
        packed = picture.pack([refining], served)
        answer = yield from self._engine.ask(picture, self._slot, packed, flags)
        result = yield from self._finish(prompt, answer)
        self._clicked += (Clicked(prompt, answer, weakref.ref(result)),)
        return result

    def _drop(self, count: int | None) -> Flow[Segmentation]:
        left = self._clicked[:-count] if count else ()
        result = (yield from self._result(left[-1])) if left else finish([], [], self._picture, 0.0)
        self._clicked = left
        return result

    def _result(self, last: Clicked) -> Flow[Segmentation]:
        shown = last.shown()
        return (yield from self._finish(last.prompt, last.answer)) if shown is None else shown

    def _finish(self, prompt: Prompt, answer: Answer) -> Flow[Segmentation]:
        result: Segmentation = yield Compute(
            lambda: finish([answer], [prompt], self._picture, _WHATEVER_SCORE)
        )
        return result

    def _in_turn(self, flow: Flow[T]) -> Flow[T]:
        """Clicks build on each other, so they are answered one at a time, in the order made."""
        yield Acquire(self._turn, self._engine.retries.timeout)
        try:
            return (yield from flow)
        finally:
            self._turn.release()

    def _check_open(self) -> None:
        if self.closed:
            raise ClientUnusable("this view is closed; open the image again to ask about it")


class View:
    """An image kept on the server, from `Client.open`. Use it in a ``with`` block.

    Nothing but prompts is sent: if the server has lost the image, it is sent again by itself.
    """

    def __init__(self, session: Session, run: Callable[[Flow[Any]], Any]) -> None:
        self._session = session
        self._run = run

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the image in pixels."""
        return self._session.size

    def segment(
        self,
        points: PointsLike | None = None,
        boxes: BoxesLike | None = None,
        *,
        prompts: Prompt | Iterable[Prompt] | None = None,
        threshold: float = 0.0,
        multimask_output: bool = True,
    ) -> Segmentation:
        """Like `Client.segment` on this image. Has nothing to do with the object being clicked."""
        options = Options(threshold, multimask_output)
        result: Segmentation = self._run(self._session.segment(points, boxes, prompts, options))
        return result

    def click(self, x: float, y: float, positive: bool = True) -> Segmentation:
        """Add a click at x, y (absolute pixels) to the object and return its mask so far.

        The first click lets the model choose among three masks (`multimask_output`); each later
        one refines that choice, with all clicks so far and the last answer's logits. The mask is
        returned whatever its score. A click that fails leaves the object as it was.
        """
        result: Segmentation = self._run(self._session.click(x, y, positive))
        return result

    def undo(self) -> Segmentation:
        """Take the last click back and return the earlier answer, empty before the first click."""
        result: Segmentation = self._run(self._session.undo())
        return result

    def reset(self) -> Segmentation:
        """Forget all clicks, to start on another object, and return an empty result."""
        result: Segmentation = self._run(self._session.reset())
        return result

    def close(self) -> None:
        """Refuse further prompts. The server lets go of the image by itself."""
        self._session.closed = True

    def __enter__(self) -> "View":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
