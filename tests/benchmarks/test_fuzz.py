"""A short fuzzing run, and that the judge notices what it should."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.environment import Provenance
from benchmarks.fuzz import __main__ as command
from benchmarks.fuzz import lethal
from benchmarks.fuzz.canary import Canary, WrongAnswer
from benchmarks.fuzz.census import Census
from benchmarks.fuzz.exchange import CLOSED, HUNG, Answer
from benchmarks.fuzz.exclusions import is_lethal
from benchmarks.fuzz.judge import (
    ANSWERED,
    DISCONNECTED,
    FINDING,
    FRONTEND_ERROR,
    REJECTED,
    Verdict,
    judge,
)
from benchmarks.fuzz.messages import Request, Tensor
from benchmarks.fuzz.octets import varint
from benchmarks.fuzz.report import markdown
from benchmarks.fuzz.run import CLICK_EVERY, Fuzzer, Outcome
from benchmarks.fuzz.structured import REFUSED, VALID, Case
from benchmarks.fuzz.subject import DECODER, middle, request
from benchmarks.fuzz.tally import RECENT, Tally
from benchmarks.fuzz.valid import ValidRequest
from server import TritonServer

SIDE = 4
"""M of the results made up here."""


@pytest.fixture(scope="module")
def fuzzer(server: TritonServer) -> Iterator[Fuzzer]:
    with closing(Fuzzer(server)) as started:
        yield started


def test_every_answer_is_masks_or_an_error(fuzzer: Fuzzer, server: TritonServer) -> None:
    before = Census.from_pid(server.pid)
    fuzzer.run(600, 0)
    assert [finding.line() for finding in fuzzer.tally.findings] == []
    after = Census.from_pid(server.pid)
    assert after.processes == before.processes
    assert fuzzer.tally.sent == 600
    assert all(fuzzer.tally.total[outcome] > 20 for outcome in (ANSWERED, REJECTED, DISCONNECTED))


def test_the_canary_notices_another_mask_and_another_score(fuzzer: Fuzzer) -> None:
    first = masks, scores = fuzzer.canary._expected[0]
    other = masks.copy()
    other[0, 0] = other[0, 0].replace(b"96", b"97", 1)
    for changed in ((other, scores), (masks, scores + 1e-3)):
        fuzzer.canary._expected[0] = changed
        with pytest.raises(WrongAnswer):
            fuzzer.canary.click()
        with pytest.raises(WrongAnswer):
            fuzzer.canary.check_again()
    fuzzer.canary._expected[0] = masks, scores + 1e-6
    fuzzer.canary.check_again()
    fuzzer.canary._expected[0] = first


def fail_at(monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    """Have the canary's click succeed `last` times, then fail once and never again."""
    clicks = count()

    def click(_: Canary) -> None:
        if next(clicks) == last:
            raise WrongAnswer("another mask")

    monkeypatch.setattr(Canary, "click", click)


def test_the_first_failure_ends_both_parts_of_the_run(
    server: TritonServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is raised itself, although hypothesis replays the case without asking the canary."""
    fail_at(monkeypatch, last=2)
    with closing(Fuzzer(server)) as fuzzer:
        with pytest.raises(WrongAnswer, match="another mask"):
            fuzzer.run(4000, 1)
        sent = list(fuzzer.tally.recent)
        assert 2 * CLICK_EVERY <= fuzzer.tally.sent < 2000  # not even one half
        with pytest.raises(WrongAnswer):
            fuzzer.octets(5, 1)
        assert list(fuzzer.tally.recent) == sent


@pytest.mark.parametrize("error", [WrongAnswer("another mask"), KeyError("of the fuzzer's own")])
def test_the_latest_requests_are_saved_however_a_run_is_aborted(
    server: TritonServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    def fail(fuzzer: Fuzzer, *_: object) -> Outcome:
        fuzzer.octets(RECENT + 2, 0)
        raise error

    monkeypatch.setattr(command, "fuzz", fail)
    monkeypatch.setattr(command, "FINDINGS", tmp_path / "findings.jsonl")
    with pytest.raises(type(error)):
        command._fuzz(server, 4, 0)
    kept = [json.loads(line) for line in command.FINDINGS.read_text().splitlines()]
    assert len(kept) == RECENT
    assert {one["reason"] for one in kept} == {"sent before the failure"}


def test_every_request_has_a_number_of_its_own() -> None:
    def count_slowly() -> Counter[str]:
        time.sleep(0.1)  # the other thread counts its request meanwhile
        return Counter()

    tally = Tally(outcomes=defaultdict(count_slowly))
    with ThreadPoolExecutor(2) as threads:
        numbers = threads.map(
            lambda kind: tally.count(kind, "HTTP", Verdict(ANSWERED), b""), ["right", "wrong"]
        )
    assert sorted(numbers) == [1, 2]


def test_memory_is_reported_by_model(server: TritonServer) -> None:
    models = {path.parents[1].name for path in server.repository.glob("*/1/model.*")}
    assert len(models) == 4
    assert set(Census.from_pid(server.pid).parts) == {"tritonserver", *models}


def test_a_server_that_dies_a_moment_later_counts_as_crashed(
    server: TritonServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    died = 0.0

    def send(_: Fuzzer) -> Answer:
        nonlocal died
        died = time.monotonic() + 0.3
        return Answer(CLOSED)

    def check_again(_: Canary) -> None:
        raise RuntimeError("no answer")

    monkeypatch.setattr(Canary, "check_again", check_again)
    monkeypatch.setattr(lethal, "is_alive", lambda _: time.monotonic() < died)
    assert lethal._try(server, send) == "tritonserver crashed (closed)"
    monkeypatch.setattr(lethal, "is_alive", lambda _: True)
    assert lethal._try(server, send).startswith("a model's process crashed")


def result(**arrays: Any) -> Any:
    """A result as tritonclient returns it."""
    outputs = [{"name": name} for name in arrays]
    return SimpleNamespace(get_response=lambda: {"outputs": outputs}, as_numpy=arrays.__getitem__)


def logits(value: float = 0, objects: int = 1, candidates: int = 3) -> Any:
    return np.full((1, objects, candidates, SIDE, SIDE), value, np.float16)


def case(expected: str) -> Case:
    valid = request(DECODER, {**middle()})
    return Case("right", valid, expected, ValidRequest(valid, images=1, objects=1))


@pytest.mark.parametrize(
    ("arrays", "outcome"),
    [
        ({"low_res_masks": logits()}, ANSWERED),
        ({"low_res_masks": logits(33)}, FINDING),
        ({"low_res_masks": logits(np.nan)}, FINDING),
        ({"low_res_masks": logits().astype(np.float32)}, FINDING),
        ({"low_res_masks": logits(objects=2)}, FINDING),
        ({"low_res_masks": logits(candidates=1)}, FINDING),
        ({"iou_predictions": np.full((1, 1, 3), 1.5, np.float32)}, FINDING),
        ({"image_id": np.array([[b"short"]], np.object_)}, FINDING),
        ({"masks": np.array([[b"not JSON"]], np.object_)}, FINDING),
        ({"boxes": np.array([[[5, 0, 1, 1]]], np.float32)}, FINDING),
        ({}, FINDING),
    ],
)
def test_a_result_must_fit_the_contract(arrays: dict[str, Any], outcome: str) -> None:
    answer = Answer("200", result=result(**arrays))
    assert judge(answer, case(VALID), True, SIDE).outcome == outcome


@pytest.mark.parametrize(
    ("code", "text", "outcome"),
    [
        ("400", "point_labels is 7; accepted are 0 and 1", REJECTED),
        ("NOT_FOUND", "image_id not found", REJECTED),
        ("400", "", FINDING),
        ("400", "12", FINDING),
        ("500", "something went wrong", FINDING),
        ("INTERNAL", "the decoder failed on this request", FINDING),
        ("400", "cannot read /tmp/models/decoder.pt2", FINDING),
        ("400", "region triton_sam3_0a1b2c3d4e5f_3 is full", FINDING),
        ("400", "cannot identify <BytesIO object at 0x7f00deadbeef>", FINDING),
        ("400", "Traceback (most recent call last)", FINDING),
        ("500", "Unable to parse 'shape': attempt to access", FRONTEND_ERROR),
        (HUNG, "", FINDING),
        (CLOSED, "", FINDING),
    ],
)
def test_an_error_has_a_message_and_leaks_nothing(code: str, text: str, outcome: str) -> None:
    assert judge(Answer(code, text), None, True, SIDE).outcome == outcome


def test_an_unexpected_answer_is_a_finding() -> None:
    refusal = Answer("400", "it is not accepted")
    assert judge(refusal, case(REFUSED), True, SIDE).outcome == REJECTED
    assert judge(refusal, case(VALID), True, SIDE).outcome == FINDING
    full = Answer("UNAVAILABLE", "Exceeds maximum queue size")
    assert judge(full, case(VALID), True, SIDE).outcome == REJECTED
    answered = Answer("200", result=result(low_res_masks=logits()))
    assert judge(answered, case(REFUSED), True, SIDE).outcome == FINDING


def test_only_broken_framing_may_be_hung_up_on() -> None:
    assert judge(Answer(CLOSED), None, False, SIDE).outcome == DISCONNECTED


@pytest.mark.parametrize(
    ("shape", "lethal"),
    [((1, 1, 1, 2), False), ((1, 2**31, 1, 2), False), ((1, 2**32, 2**31, 2), True),
     ((1, 0, 2**62, 2), True)],
)  # fmt: skip
def test_shapes_that_crash_the_decoder_are_known(shape: tuple[int, ...], lethal: bool) -> None:
    assert is_lethal(Request(DECODER, (Tensor("point_coords", "FP32", shape),))) is lethal


def test_values_in_json_for_a_huge_shape_crash_the_server_and_are_known() -> None:
    def spelled(*shape: int) -> Request:
        return Request(DECODER, (Tensor("point_coords", "FP32", shape, values=[0.5]),))

    assert is_lethal(spelled(1, 2**31, 1, 2))
    assert not is_lethal(spelled(1, 2000, 1, 2))


def test_quoting_the_caller_is_not_a_leak() -> None:
    answer = Answer("400", "unexpected input masks.py")
    assert judge(answer, None, True, SIDE).outcome == FINDING
    assert judge(answer, None, True, SIDE, b"masks.py").outcome == REJECTED


def test_classification_of_strings_crashes_the_server_and_is_known() -> None:
    ranked = {"name": "image_id", "parameters": {"classification": 1}}
    assert is_lethal(Request(DECODER, (), outputs=(ranked,)))
    assert not is_lethal(Request(DECODER, (), outputs=({"name": "image_id"},)))


def test_numbers_are_encoded_as_protobuf_varints() -> None:
    assert [varint(n) for n in (0, 127, 300)] == [b"\0", b"\x7f", b"\xac\x02"]


def test_a_restarted_process_is_noticed_and_reported(tmp_path: Path) -> None:
    marks = [
        Census(frozenset({(1, started)}), 2 * 2**20, {"tritonserver": 2**20}, 0)
        for started in (1.0, 2.0)
    ]
    outcome = Outcome(4, Tally(), Tally(), marks, 0.9)
    assert not outcome.same_processes
    text = markdown(outcome, Provenance("make fuzz", "abc", "a machine", "versions", "0.1"))
    assert "NOT the same" in text
    assert "Findings: 0." in text


def test_findings_of_the_warm_up_are_published() -> None:
    marks = [Census(frozenset(), 2 * 2**20, {"tritonserver": 2**20}, 0)]
    warm_up, tally = Tally(), Tally()
    for counted in (warm_up, warm_up, tally):
        counted.count("kind", "HTTP", Verdict(FINDING, "a path in a message"), b"")
    outcome = Outcome(4, warm_up, tally, marks, 0.9)
    text = markdown(outcome, Provenance("make fuzz", "abc", "a machine", "versions", "0.1"))
    assert "Findings: 3, 2 of them in the warm-up." in text
