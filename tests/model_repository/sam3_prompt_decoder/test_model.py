"""A request that the decoder fails on is rejected alone; those decoded with it are answered."""

from __future__ import annotations

import copy
import importlib
import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from decoder import Decoder
from google.protobuf.json_format import MessageToDict  # type: ignore[import-untyped]
from jobs import Answers, Job

from export.repository import DECODER, read_config
from tests.export import tiny
from tests.model_repository.sam3_prompt_decoder.backend import InferenceResponse, Request
from tests.model_repository.sam3_prompt_decoder.served import Arrays, alike, clicks, flag
from tests.model_repository.sam3_prompt_decoder.test_decoder import features

FAILED = "the decoder failed on this request; the server's log says why"
OUT_OF_MEMORY = (
    "the decoder ran out of memory on this request; ask for fewer objects at a time, or try again "
    "later"
)
PLACE = 0.125
"""The decoder fails on a click here."""

Start = Callable[[Sequence[Job]], Answers]


@pytest.fixture(scope="module")
def loaded(backend: Any, exported: tiny.Export) -> Iterator[Any]:
    """The model as Triton makes it."""
    config = read_config(exported.repository, DECODER)
    made = importlib.import_module("model").TritonPythonModel()
    made.initialize(
        {
            "model_config": json.dumps(MessageToDict(config, preserving_proto_field_name=True)),
            "model_instance_kind": "CPU",
            "model_instance_device_id": "0",
            "model_repository": str(exported.repository / DECODER),
            "model_name": DECODER,
            "model_version": "1",
        }
    )
    yield made
    made.finalize()


@pytest.fixture
def model(loaded: Any, backend: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """With a decoder that a test may modify, and an empty log."""
    backend.errors.clear()
    monkeypatch.setattr(loaded, "_decoder", copy.copy(loaded._decoder))
    return loaded


def request(seed: int, objects: int = 1, tokens: int = 1, **more: Any) -> Request:
    """Clicks on an image of its own."""
    embedded = {name: t.numpy()[None] for name, t in features(seed)._asdict().items()}
    return Request({**embedded, **clicks(objects, tokens, seed=seed), **more})


def guilty(seed: int = 9) -> Request:
    return request(seed, point_coords=np.full((1, 1, 1, 2), PLACE, np.float32))


def is_guilty(jobs: Sequence[Job]) -> bool:
    return any((prompt.coords == PLACE).any() for job in jobs for prompt in job.objects)


def change_start(model: Any, change: Callable[[Start, Sequence[Job]], Answers]) -> None:
    """Replace the decoder's `start` by `change`, which gets the original."""
    decoder: Decoder = model._decoder
    start = decoder.start
    model._decoder.start = lambda jobs: change(start, jobs)


def fail_on_the_guilty(model: Any, failure: Callable[[], object]) -> None:
    def change(start: Start, jobs: Sequence[Job]) -> Answers:
        if is_guilty(jobs):
            failure()
        return start(jobs)

    change_start(model, change)


def broken() -> NoReturn:
    raise RuntimeError("an operator that is broken")


def answer_alone(model: Any, requests: Sequence[Request]) -> list[Arrays]:
    """The answer to each request sent alone."""
    return [model.execute([one])[0].arrays for one in requests]


def assert_answered(response: InferenceResponse, expected: Arrays) -> None:
    for name in ("low_res_masks", "iou_predictions"):
        alike(response.arrays[name], expected[name])


def assert_refused(response: InferenceResponse, sentence: str, code: str = "INTERNAL") -> None:
    assert response.error is not None
    assert (response.error.sentence, response.error.code) == (sentence, code)


@pytest.mark.semantic(
    "masks",
    "a request that the decoder fails on is refused alone, its neighbours answered",
    "equality",
)
@pytest.mark.parametrize("place", range(4))
def test_only_the_request_that_the_decoder_fails_on_gets_an_error(
    model: Any, backend: Any, place: int
) -> None:
    innocent = [request(1), request(2, 3, 2), request(3, keep_image=flag(True))]
    expected = answer_alone(model, innocent)
    fail_on_the_guilty(model, broken)
    responses = model.execute([*innocent[:place], guilty(), *innocent[place:]])
    assert_refused(responses.pop(place), FAILED)
    for response, alone in zip(responses, expected, strict=True):
        assert_answered(response, alone)
    assert [response.arrays["image_id"].item() != "" for response in responses] == [0, 0, 1]
    (message,) = backend.errors
    assert "in broken" in message  # the traceback, for the operator only
    assert message.endswith("RuntimeError: an operator that is broken\n")


def test_a_single_failing_request_gets_an_error_and_the_next_is_answered(model: Any) -> None:
    (expected,) = answer_alone(model, [request(1)])
    fail_on_the_guilty(model, broken)
    assert_refused(model.execute([guilty()])[0], FAILED)
    assert_answered(model.execute([request(1)])[0], expected)


def test_errors_are_in_the_order_of_their_requests(model: Any) -> None:
    """An invalid prompt never reaches the decoder."""
    (expected,) = answer_alone(model, [request(1)])
    fail_on_the_guilty(model, broken)
    wrong = request(2, point_labels=np.full((1, 1, 1), 9, np.int32))
    counted = model._metrics._failures
    first, second, third, fourth = model.execute([guilty(), wrong, request(1), guilty(8)])
    assert model._metrics._failures == counted + 2  # an invalid request is the caller's failure
    assert_refused(first, FAILED)
    assert second.error.code == "INVALID_ARG"
    assert second.error.sentence.startswith("point_labels[0, 0] is 9; accepted are")
    assert_answered(third, expected)
    assert_refused(fourth, FAILED)


def no_memory() -> NoReturn:
    raise MemoryError


def no_memory_of_the_gpu() -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def no_page_locked_memory() -> NoReturn:
    raise torch.AcceleratorError("CUDA error: out of memory")


def more_than_there_is() -> object:
    """In torch's own words, on a CPU."""
    return torch.empty(2**50)


@pytest.mark.parametrize(
    "failure", [no_memory, no_memory_of_the_gpu, no_page_locked_memory, more_than_there_is]
)
def test_out_of_memory_has_a_sentence_of_its_own(
    model: Any, backend: Any, failure: Callable[[], object]
) -> None:
    (expected,) = answer_alone(model, [request(1)])
    fail_on_the_guilty(model, failure)
    refused, answered = model.execute([guilty(), request(1)])
    assert_refused(refused, OUT_OF_MEMORY)
    assert_answered(answered, expected)
    assert f"in {failure.__name__}" in backend.errors[0]


def test_requests_too_large_together_are_decoded_one_by_one(model: Any, backend: Any) -> None:
    """And by then, memory held for all of them together has been freed."""
    requests = [request(seed) for seed in range(3)]
    expected = answer_alone(model, requests)
    held: list[weakref.ref[Any]] = []

    def change(start: Start, jobs: Sequence[Job]) -> Answers:
        if len(jobs) > 1:
            room = torch.empty(1)
            held.append(weakref.ref(room))
            no_memory()
        assert [one() for one in held] == [None]
        return start(jobs)

    change_start(model, change)
    for response, alone in zip(model.execute(requests), expected, strict=True):
        assert_answered(response, alone)
    assert not backend.errors


def test_a_late_failure_does_not_affect_other_batches(model: Any, backend: Any) -> None:
    """A GPU's failure shows when its answers are read, and does not tell whose it is."""
    requests = [request(1), guilty(), request(2), request(3)]
    expected = answer_alone(model, requests)

    def change(start: Start, jobs: Sequence[Job]) -> Answers:
        answers = start(jobs)
        if is_guilty(jobs):
            answers.by_job = broken  # type: ignore[method-assign]
        return answers

    change_start(model, change)
    model._decoder._batch_size = 2
    responses = model.execute(requests)
    for response in responses[:2]:
        assert_refused(response, FAILED)
    for response, alone in zip(responses[2:], expected[2:], strict=True):
        assert_answered(response, alone)
    assert all("in broken" in message for message in backend.errors)


def test_no_memory_to_keep_an_image_is_an_error(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (expected,) = answer_alone(model, [request(1)])
    monkeypatch.setattr(model._store, "keep", lambda _: no_memory())
    refused, answered = model.execute([request(2, keep_image=flag(True)), request(1)])
    assert_refused(refused, OUT_OF_MEMORY)
    assert_answered(answered, expected)


def test_no_room_in_the_store_for_an_image_is_an_error(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request to keep one is told so; one without it is answered."""
    (expected,) = answer_alone(model, [request(1)])
    monkeypatch.setattr(model._store, "max_bytes", 1)
    refused, answered = model.execute([request(1, keep_image=flag(True)), request(1)])
    assert refused.error.code == "INVALID_ARG"
    assert refused.error.sentence.startswith(
        "keep_image is not possible: this request's embeddings"
    )
    assert_answered(answered, expected)


def test_a_server_that_keeps_no_images_answers_without_an_id(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `kept_images_bytes` 0: clients ask to keep every image, and are not refused."""
    (expected,) = answer_alone(model, [request(1)])
    monkeypatch.setattr(model._store, "max_bytes", 0)
    (answered,) = model.execute([request(1, keep_image=flag(True))])
    assert_answered(answered, expected)
    assert answered.arrays["image_id"].tolist() == [[""]]
