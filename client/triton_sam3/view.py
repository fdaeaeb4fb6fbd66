"""An image kept on the server, and the object being clicked on it.

click ─► all clicks so far + the logits of the last answer ─► one more `ClickState` in the history
undo  ─► one step back in the history, to exactly the state before; redo ─► one step forward
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

_NO_THRESHOLD = float("-inf")
"""A person who clicks wants to see the mask, however low its score."""


@dataclass(frozen=True)
class ClickState:
    """The object after a click: all its points, and the answer.

    Masks at the image's size take a megabyte per megapixel, so they live only while somebody else
    holds them; `undo` makes them again from the answer.
    """

    prompt: Prompt
    answer: Answer
    result_ref: weakref.ref[Segmentation]


class Session:
    """What `View` and `AsyncView` share: the history of clicks, and flows that take turns on it."""

    def __init__(self, engine: Engine, picture: Picture, slot: ImageSlot) -> None:
        self._engine = engine
        self._picture = picture
        self._slot = slot
        self._history: tuple[ClickState, ...] = ()
        self._made = 0
        """How many clicks of the history count; the others are undone."""
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
        self._check_open()
        return self._in_turn(self._move(-1))

    def redo(self) -> Flow[Segmentation]:
        self._check_open()
        return self._in_turn(self._move(1))

    def reset(self) -> Flow[Segmentation]:
        self._check_open()
        return self._in_turn(self._clear())

    def _click(self, point: Point) -> Flow[Segmentation]:
        """The first click may mean a whole or a part, so the model proposes three masks; later
        clicks refine the mask it already chose, as SAM is meant to be used."""
        last = self._history[self._made - 1] if self._made else None
        points = (*last.prompt.points, point) if last else (point,)
        detection_id = last.prompt.detection_id if last else str(uuid.uuid4())
        prompt = Prompt(points=points, detection_id=detection_id)
        refining = replace(prompt, mask=last.answer.logits[0]) if last else prompt
        flags = Flags(multimask_output=last is None)
        picture = self._picture
        served = yield from self._engine.served()
        packed = picture.pack([refining], served)
        answer = yield from self._engine.ask(picture, self._slot, packed, flags)
        result = yield from self._finish(prompt, answer)
        state = ClickState(prompt, answer, weakref.ref(result))
        self._history = (*self._history[: self._made], state)
        self._made += 1
        return result

    def _move(self, steps: int) -> Flow[Segmentation]:
        made = min(max(self._made + steps, 0), len(self._history))
        result = (yield from self._result(self._history[made - 1])) if made else self._empty()
        self._made = made
        return result

    def _clear(self) -> Flow[Segmentation]:
        yield from ()  # a flow without a step
        self._history, self._made = (), 0
        return self._empty()

    def _empty(self) -> Segmentation:
        return finish([], [], self._picture, 0.0)

    def _result(self, last: ClickState) -> Flow[Segmentation]:
        result = last.result_ref()
        return (yield from self._finish(last.prompt, last.answer)) if result is None else result

    def _finish(self, prompt: Prompt, answer: Answer) -> Flow[Segmentation]:
        result: Segmentation = yield Compute(
            lambda: finish([answer], [prompt], self._picture, _NO_THRESHOLD)
        )
        return result

    def _in_turn(self, flow: Flow[T]) -> Flow[T]:
        """Clicks build on each other, so they are answered one at a time, in order."""
        yield Acquire(self._turn)
        try:
            return (yield from flow)
        finally:
            self._turn.release()

    def _check_open(self) -> None:
        if self.closed:
            raise ClientUnusable("this view is closed; open the image again to segment it")


class View:
    """An image kept on the server, from `Client.open`. Use it in a ``with`` block.

    Only prompts are sent; if the server has lost the image, it is sent again automatically.
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
        """Like `Client.segment`, on this image. Does not affect the object being clicked."""
        options = Options(threshold, multimask_output)
        result: Segmentation = self._run(self._session.segment(points, boxes, prompts, options))
        return result

    def click(self, x: float, y: float, positive: bool = True) -> Segmentation:
        """Add a click at x, y (absolute pixels) to the object and return its mask so far.

        The first click lets the model choose among three masks (`multimask_output`); each later
        one refines that choice, using all clicks so far and the last answer's logits. The mask is
        returned whatever its score, under the same `detection_id` for all clicks on an object.

        Raises PromptError for a click outside the image, and the errors of `Client.segment`. A
        click that fails leaves the object unchanged.
        """
        result: Segmentation = self._run(self._session.click(x, y, positive))
        return result

    def undo(self) -> Segmentation:
        """Undo the last click and return the result before it, empty before the first click."""
        result: Segmentation = self._run(self._session.undo())
        return result

    def redo(self) -> Segmentation:
        """Redo the click that was undone last and return its result.

        After another click or `reset` there is nothing to redo: the current result is returned.
        """
        result: Segmentation = self._run(self._session.redo())
        return result

    def reset(self) -> Segmentation:
        """Clear all clicks, to start another object, and return an empty result."""
        result: Segmentation = self._run(self._session.reset())
        return result

    def close(self) -> None:
        """Reject further prompts. The image expires on the server by itself."""
        self._session.closed = True

    def __enter__(self) -> "View":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
