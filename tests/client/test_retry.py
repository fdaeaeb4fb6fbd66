"""When a request is sent again, driven by hand: no server, no waiting."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from triton_sam3.errors import (
    DeadlineExceeded,
    ImageNotKept,
    InvalidRequest,
    ModelUnavailable,
    Overloaded,
    SAM3Error,
    ServerUnreachable,
)
from triton_sam3.flow import Call, Infer, Query, Sleep
from triton_sam3.retry import Retries, check_timeout
from triton_sam3.translation import ModelGone, Refused

REQUEST = Infer("sam3_prompt_decoder", {}, ())


def longest(low: float, high: float) -> float:
    assert low == high / 2
    return high


def shortest(low: float, high: float) -> float:
    return low


def drive(
    retries: Retries, answer: Callable[[Call], Any], request: Infer | Query = REQUEST
) -> tuple[Any, list[Call], list[float]]:
    """Run a flow to its end; the answer, what was sent, how long it slept in between."""
    flow = retries.send(request)
    calls, pauses = [], []
    step = next(flow)
    try:
        while True:
            if isinstance(step, Sleep):
                pauses.append(step.seconds)
                step = flow.send(None)
                continue
            assert isinstance(step, Call)
            calls.append(step)
            try:
                value = answer(step)
            except SAM3Error as error:
                step = flow.throw(error)
            else:
                step = flow.send(value)
    except StopIteration as done:
        return done.value, calls, pauses


def failing(error: type[SAM3Error], times: int) -> Callable[[Call], str]:
    left = [times]

    def answer(call: Call) -> str:
        if left[0]:
            left[0] -= 1
            raise error("no")
        return "yes"

    return answer


@pytest.mark.parametrize("error", [ServerUnreachable, Overloaded, ModelGone])
def test_errors_that_may_pass_are_retried(error: type[SAM3Error]) -> None:
    retries = Retries(4, uniform=longest)
    value, calls, _ = drive(retries, failing(error, 3))
    assert value == "yes"
    assert len(calls) == 4


@pytest.mark.parametrize(
    "error", [InvalidRequest, ImageNotKept, ModelUnavailable, DeadlineExceeded]
)
def test_errors_that_will_not_pass_are_not_retried(error: type[SAM3Error]) -> None:
    seen = []

    def answer(call: Call) -> None:
        seen.append(call)
        raise error("no")

    with pytest.raises(error):
        drive(Retries(4), answer)
    assert len(seen) == 1


def test_a_query_about_a_model_that_is_gone_fails_at_once() -> None:
    with pytest.raises(ModelGone):
        drive(Retries(4), failing(ModelGone, 1), Query("get_model_metadata"))


def test_the_number_of_retries_is_limited() -> None:
    seen = []

    def answer(call: Call) -> None:
        seen.append(call)
        raise Overloaded("no")

    with pytest.raises(Overloaded):
        drive(Retries(2, uniform=longest), answer)
    assert len(seen) == 3


def test_requests_rejected_by_a_proxy_are_retried_for_as_long_as_the_call_may_take() -> None:
    """steps.py ends them: for hours, if need be."""
    value, calls, pauses = drive(Retries(1, uniform=longest), failing(Refused, 2000))
    assert (value, len(calls)) == ("yes", 2001)
    assert sum(pauses) > 7200


def test_without_retries_a_rejection_by_a_proxy_is_raised_at_once() -> None:
    seen = []

    def answer(call: Call) -> None:
        seen.append(call)
        raise Refused("full")

    with pytest.raises(Refused):
        drive(Retries(0), answer)
    assert len(seen) == 1


def test_rejections_by_a_proxy_do_not_count_as_retries() -> None:
    errors = [Refused("full"), ServerUnreachable("gone")] * 2

    def answer(call: Call) -> None:
        raise errors.pop(0)

    with pytest.raises(ServerUnreachable):
        drive(Retries(1, uniform=shortest), answer)
    assert not errors


def test_pauses_double_up_to_a_cap() -> None:
    retries = Retries(6, base=0.5, cap=4.0, uniform=longest)
    _, _, pauses = drive(retries, failing(Overloaded, 6))
    assert pauses == [0.5, 1.0, 2.0, 4.0, 4.0, 4.0]


def test_jitter_spreads_the_pauses_over_the_upper_half() -> None:
    pauses = []
    for _ in range(50):
        pauses += drive(Retries(1, base=1.0), failing(Overloaded, 1))[2]
    assert 0.5 <= min(pauses) < 0.6
    assert 0.9 < max(pauses) <= 1.0


def test_even_the_shortest_pauses_outlast_a_short_outage() -> None:
    """A proxy that has no server for a moment, and a gRPC channel that backs off besides."""
    retries = Retries(4, uniform=shortest)
    _, _, pauses = drive(retries, failing(ServerUnreachable, retries.attempts))
    assert sum(pauses) > 1.8


@pytest.mark.parametrize("timeout", [None, "9", 0, -1.0, float("inf"), float("nan"), 9e9])
def test_a_timeout_must_be_a_finite_number_of_seconds(timeout: Any) -> None:
    with pytest.raises(ValueError, match=r"seconds above 0, at most 1e\+09, got"):
        check_timeout(timeout)


@pytest.mark.parametrize("attempts", [-1, 1.5, "2", None, True])
def test_retries_must_be_a_whole_number(attempts: Any) -> None:
    with pytest.raises(ValueError, match="retries must be an integer of at least 0, got"):
        Retries(attempts)


def test_numpy_numbers_are_accepted() -> None:
    numbers: tuple[Any, Any] = np.int64(1), np.float32(2)
    assert Retries(numbers[0]).attempts == 1
    assert type(check_timeout(numbers[1])) is float
