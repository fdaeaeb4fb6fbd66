"""The client's logic step by step, with a fake server."""

import threading
from collections import Counter
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import numpy as np
import pytest
from numpy.typing import NDArray

from triton_sam3 import contract
from triton_sam3.engine import Engine, Options, Picture, gather_prompts
from triton_sam3.errors import (
    ClientUnusable,
    ImageNotKept,
    InvalidRequest,
    PromptError,
    SAM3Error,
    ServerError,
)
from triton_sam3.flow import Acquire, Array, Call, Flow, Infer, Query
from triton_sam3.prompts import Prompt
from triton_sam3.protocol import ServedModel
from triton_sam3.retry import Retries
from triton_sam3.steps import _perform, perform

T = TypeVar("T")
S, M, LIMIT = 56, 16, 4
IMAGE: NDArray[np.uint8] = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
POINT = Prompt(points=[(10, 20)])


class FakeServer:
    """Answers requests as the served models would, and counts them."""

    def __init__(self, *, keeps: bool = True) -> None:
        self.keeps = keeps
        self.kept: set[bytes] = set()
        self.requests: list[Infer] = []
        self.queries: list[Query] = []

    def config(self) -> dict[str, Any]:
        sides = [{"name": "image", "dims": [S, S, 3]}, {"name": "mask_input", "dims": [-1, M, M]}]
        limits = {"max_objects": LIMIT, "max_tokens": LIMIT}
        parameters = {name: {"string_value": str(most)} for name, most in limits.items()}
        return {"name": "either", "input": sides, "parameters": parameters}

    def infer(self, request: Infer) -> dict[str, Array]:
        inputs: dict[str, Any] = dict(request.inputs)
        if "image_id" in inputs and inputs["image_id"].item() not in self.kept:
            raise ImageNotKept("image_id not found")
        objects = inputs["point_labels"].shape[1]
        outputs: dict[str, Array] = {
            "low_res_masks": np.ones((1, objects, 1, M, M), np.float16),
            "iou_predictions": np.ones((1, objects, 1), np.float32),
        }
        if "keep_image" in inputs:
            image_id = f"id-{len(self.requests)}".encode() if self.keeps else b""
            self.kept.add(image_id)
            outputs["image_id"] = np.array([[image_id]], object)
        return outputs

    @property
    def models(self) -> Counter[str]:
        return Counter(request.model for request in self.requests)

    def drive(self, flow: Flow[T]) -> T:
        return perform(flow, self)

    def call(self, call: Call) -> Any:
        if isinstance(call.request, Query):
            self.queries.append(call.request)
            return self.config()
        self.requests.append(call.request)
        return self.infer(call.request)

    def close(self) -> None: ...


@pytest.fixture
def fake_server() -> FakeServer:
    return FakeServer()


def engine(remember_images: int = 8) -> Engine:
    return Engine(Retries(0), remember_images, None, threading.Lock)


def segment(fake_server: FakeServer, engine: Engine, *prompts: Prompt, keep: bool = True) -> Any:
    return fake_server.drive(engine.segment(IMAGE, prompts, Options(), keep=keep))


def test_an_image_must_be_opened_again_for_a_model_of_another_size() -> None:
    picture = Picture(IMAGE)
    assert picture.pixels(S).shape == (S, S, 3)
    with pytest.raises(ClientUnusable, match=r"of 56×56 pixels, .* 70×70: open the image again"):
        picture.pixels(70)
    assert picture.pixels(S).shape == (S, S, 3)


def test_a_known_image_is_used_by_id(fake_server: FakeServer) -> None:
    known = engine()
    for _ in range(3):
        assert len(segment(fake_server, known, POINT)) == 1
    assert fake_server.models == {contract.INTERACTIVE: 1, contract.DECODER: 2}


def test_the_configuration_is_read_once(fake_server: FakeServer) -> None:
    known = engine()
    for _ in range(3):
        segment(fake_server, known, POINT)
    queried = [query.args for query in fake_server.queries]
    assert queried == [(contract.INTERACTIVE,), (contract.DECODER,)]


def test_the_configuration_is_read_again_after_a_rejected_request(fake_server: FakeServer) -> None:
    """Another export may be served by now, of another size."""

    class Refuses(FakeServer):
        def infer(self, _: Infer) -> dict[str, Array]:
            raise InvalidRequest("unexpected shape for input 'image'")

    known = engine()
    segment(fake_server, known, POINT)
    with pytest.raises(InvalidRequest):
        segment(Refuses(), known, POINT)
    segment(fake_server, known, POINT)
    assert len(fake_server.queries) == 2 * len({query.args for query in fake_server.queries})


def test_without_memory_every_call_sends_the_image(fake_server: FakeServer) -> None:
    forgetful = engine(remember_images=0)
    for _ in range(3):
        segment(fake_server, forgetful, POINT)
    assert fake_server.models == {contract.INTERACTIVE: 3}
    assert not fake_server.kept


def test_an_image_is_not_kept_unless_requested(fake_server: FakeServer) -> None:
    segment(fake_server, engine(), POINT, keep=False)
    assert not fake_server.kept


@pytest.mark.parametrize("remember_images", [0, 8])
@pytest.mark.parametrize(("prompts", "requests"), [(LIMIT, 1), (LIMIT + 1, 2), (5 * LIMIT, 5)])
def test_many_prompts_become_several_requests_on_one_encoding(
    fake_server: FakeServer, prompts: int, requests: int, remember_images: int
) -> None:
    result = segment(fake_server, engine(remember_images), *[POINT] * prompts)
    assert len(result) == prompts
    assert fake_server.models[contract.INTERACTIVE] == 1
    assert fake_server.models[contract.DECODER] == requests - 1
    sizes = [request.inputs["point_labels"].shape[1] for request in fake_server.requests]
    assert max(sizes) <= LIMIT
    assert sum(sizes) == prompts


def test_an_invalid_last_prompt_is_found_before_anything_is_sent(fake_server: FakeServer) -> None:
    outside, longest = Prompt(points=[(1000, 1000)]), Prompt(points=[(1, 1)] * (LIMIT + 1))
    for bad, says in ((outside, "outside the"), (longest, f"at most {LIMIT}")):
        with pytest.raises(PromptError, match=rf"^objects\[{2 * LIMIT}\]: .*{says}"):
            segment(fake_server, engine(), *[POINT] * 2 * LIMIT, bad)
    assert not fake_server.requests


def test_no_prompts_give_an_empty_result_without_a_request(fake_server: FakeServer) -> None:
    result = segment(fake_server, engine())
    assert len(result) == 0
    assert result.image_size == (40, 30)
    assert not fake_server.requests
    assert not fake_server.queries


def test_an_evicted_image_is_sent_again_once(fake_server: FakeServer) -> None:
    known = engine()
    segment(fake_server, known, POINT)
    fake_server.kept.clear()
    assert len(segment(fake_server, known, POINT)) == 1
    assert fake_server.models == {contract.INTERACTIVE: 2, contract.DECODER: 1}
    segment(fake_server, known, POINT)
    assert fake_server.models == {contract.INTERACTIVE: 2, contract.DECODER: 2}


def test_a_server_that_evicts_every_image_at_once_still_answers(fake_server: FakeServer) -> None:
    class Leaky(FakeServer):
        def infer(self, request: Infer) -> dict[str, Array]:
            outputs = super().infer(request)
            self.kept.clear()
            return outputs

    leaky, known = Leaky(), engine()
    for _ in range(4):
        assert len(segment(leaky, known, POINT)) == 1
    assert leaky.models[contract.INTERACTIVE] == 4


def test_an_id_from_another_caller_is_tried_before_the_image_is_sent(
    fake_server: FakeServer,
) -> None:
    known = engine()
    segment(fake_server, known, POINT)
    slot = known._memory.slot(Picture(IMAGE).digest)
    flow = known.segment(IMAGE, [POINT], Options())
    fake_server.drive(_until_lost(flow, fake_server, lambda: setattr(slot, "image_id", b"id-new")))
    assert fake_server.models == {contract.INTERACTIVE: 1, contract.DECODER: 2}


def _until_lost(flow: Flow[T], fake_server: FakeServer, meanwhile: Callable[[], None]) -> Flow[T]:
    """Let the first request by id fail, while another caller puts a new id in the slot."""
    step = next(flow)
    while not (isinstance(step, Call) and isinstance(step.request, Infer)):
        step = flow.send((yield step))
    fake_server.requests.append(step.request)
    fake_server.kept = {b"id-new"}
    meanwhile()
    step = flow.throw(ImageNotKept("image_id not found"))
    return (yield from _rest(flow, step))


def _rest(flow: Flow[T], step: Any) -> Generator[Any, Any, T]:
    try:
        while True:
            step = flow.send((yield step))
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]


def test_two_callers_with_a_new_image_encode_it_once(fake_server: FakeServer) -> None:
    known = engine()
    first = known.segment(IMAGE, [POINT], Options())
    second = known.segment(IMAGE, [POINT], Options())
    step = _advance(first, fake_server)  # holds the slot's lock, its image on the way
    assert isinstance(step, Call)
    waiting = _advance(second, fake_server)
    assert isinstance(waiting, Acquire)
    fake_server.drive(_rest(first, step))
    fake_server.drive(_rest(second, waiting))
    assert fake_server.models == {contract.INTERACTIVE: 1, contract.DECODER: 1}


def test_callers_do_not_wait_for_each_other_if_the_server_keeps_no_images() -> None:
    stingy, known = FakeServer(keeps=False), engine()
    segment(stingy, known, POINT)
    first, second = (known.segment(IMAGE, [POINT], Options()) for _ in range(2))
    for flow in (first, second):  # both on the way, neither has been answered
        assert isinstance(_advance(flow, stingy), Call)
    stingy.keeps = True
    for _ in range(2):
        segment(stingy, known, POINT)
    assert stingy.models == {contract.INTERACTIVE: 2, contract.DECODER: 1}


def _advance(flow: Flow[Any], fake_server: FakeServer) -> Any:
    """Run to the first inference, or to a lock that another flow holds."""
    step = next(flow)
    while True:
        if isinstance(step, Call) and isinstance(step.request, Infer):
            return step
        if isinstance(step, Acquire) and step.lock.locked():
            return step
        step = flow.send(_perform(step, fake_server))


def test_after_a_failure_the_next_caller_can_send_the_image(fake_server: FakeServer) -> None:
    known = engine()
    failing = known.segment(IMAGE, [POINT], Options())
    _advance(failing, fake_server)
    with pytest.raises(SAM3Error, match="broken"):
        failing.throw(SAM3Error("broken"))
    abandoned = known.segment(IMAGE, [POINT], Options())
    _advance(abandoned, fake_server)
    abandoned.close()  # as on Ctrl-C or a cancelled task
    assert len(segment(fake_server, known, POINT)) == 1


def test_opening_sends_the_image_once_and_requests_no_mask(fake_server: FakeServer) -> None:
    known = engine()
    for _ in range(2):
        fake_server.drive(known.open(IMAGE))
    assert len(fake_server.requests) == 1
    assert fake_server.requests[0].outputs == ("image_id",)


@pytest.mark.parametrize("remember_images", [0, 8])
def test_an_open_image_is_used_by_id_whatever_the_client_remembers(
    fake_server: FakeServer, remember_images: int
) -> None:
    known = engine(remember_images)
    picture, slot = fake_server.drive(known.open(IMAGE))
    for _ in range(2):
        fake_server.drive(known.segment_picture(picture, slot, [POINT], Options()))
    fake_server.kept.clear()
    fake_server.drive(known.segment_picture(picture, slot, [POINT], Options()))
    fake_server.drive(known.segment_picture(picture, slot, [POINT], Options()))
    assert fake_server.models == {contract.INTERACTIVE: 2, contract.DECODER: 4}


@pytest.mark.parametrize("shape", [(S, S, 3), (30, 40, 3)])
def test_later_edits_of_an_open_image_do_no_harm(
    fake_server: FakeServer, shape: tuple[int, ...]
) -> None:
    """Not even where the server has lost it and it is sent again."""
    image, known = np.full(shape, 200, np.uint8), engine()
    picture, slot = fake_server.drive(known.open(image))
    image[:] = 77
    fake_server.kept.clear()
    fake_server.drive(known.segment_picture(picture, slot, [POINT], Options()))
    sent: list[Any] = [r.inputs["image"] for r in fake_server.requests if "image" in r.inputs]
    assert [np.unique(pixels).tolist() for pixels in sent] == [[200], [200]]


def test_a_model_without_limits_is_rejected(fake_server: FakeServer) -> None:
    bare = {name: value for name, value in fake_server.config().items() if name != "parameters"}
    with pytest.raises(ServerError, match="has no parameter 'max_objects'"):
        ServedModel.from_configs(bare, bare)


def test_prompts_cannot_be_combined_with_points_or_boxes() -> None:
    assert gather_prompts(None, None, [POINT]) == (POINT,)
    assert gather_prompts(None, None, POINT) == (POINT,)
    assert len(gather_prompts([(1, 2)], [(0, 0, 1, 1)], None)) == 2
    with pytest.raises(PromptError, match="either prompts, or points and boxes"):
        gather_prompts([(1, 2)], None, [POINT])
    with pytest.raises(PromptError, match="nothing to segment"):
        gather_prompts(None, None, None)
    with pytest.raises(PromptError, match=r"Prompt values, got \(1, 2\)"):
        gather_prompts(None, None, [(1, 2)])  # type: ignore[list-item]
    with pytest.raises(PromptError, match="Prompt values, got 5"):
        gather_prompts(None, None, 5)  # type: ignore[arg-type]


@pytest.mark.parametrize("threshold", [float("nan"), "0.5", None, True, [0.1]])
def test_a_threshold_must_be_a_number(threshold: Any) -> None:
    with pytest.raises(PromptError, match="threshold must be a number, got"):
        Options(threshold)


@pytest.mark.parametrize("switch", ["false", None, 2, np.array([True, False])])
def test_multimask_output_must_be_a_boolean(switch: Any) -> None:
    with pytest.raises(PromptError, match="multimask_output must be true or false, got"):
        Options(multimask_output=switch)


@pytest.mark.parametrize("images", [-1, 1.5, "3", None])
def test_remember_images_must_be_a_whole_number(images: Any) -> None:
    with pytest.raises(ValueError, match="remember_images must be an integer of at least 0"):
        Engine(Retries(0), images, None, threading.Lock)


@pytest.mark.parametrize("shape", [(S, S, 3), (30, 40, 3)])
@pytest.mark.parametrize("view", [slice(None), slice(None, None, -1)])
def test_an_image_refilled_before_it_is_sent_is_still_the_one_given(
    fake_server: FakeServer, shape: tuple[int, ...], view: slice
) -> None:
    """As a camera does while the client waits: otherwise the next frame would be kept under the
    digest of this one."""
    frame = np.full(shape, 200, np.uint8)
    picture = Picture(frame[view])
    frame[:] = 77
    assert picture.digest == Picture(np.full(shape, 200, np.uint8)).digest
    assert np.unique(picture.pixels(S)).tolist() == [200]
