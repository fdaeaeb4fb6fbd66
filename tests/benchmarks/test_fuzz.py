"""The fuzzing in short, and that its judge would notice what it is there to notice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.environment import Provenance
from benchmarks.fuzz.canary import WrongAnswer
from benchmarks.fuzz.census import Census
from benchmarks.fuzz.exchange import CLOSED, HUNG, Answer
from benchmarks.fuzz.exclusions import is_lethal
from benchmarks.fuzz.judge import ANSWERED, CUT, FINDING, IN_WORDS, SERVERS_OWN, judge
from benchmarks.fuzz.messages import Request, Tensor
from benchmarks.fuzz.octets import varint
from benchmarks.fuzz.report import markdown
from benchmarks.fuzz.run import Fuzzer, Outcome
from benchmarks.fuzz.structured import REFUSED, VALID, Case
from benchmarks.fuzz.subject import DECODER, middle, request
from benchmarks.fuzz.tally import Tally
from benchmarks.fuzz.valid import Right
from server import TritonServer

SIDE = 4
"""M of the results made up here."""


@pytest.fixture(scope="module")
def fuzzer(server: TritonServer) -> Iterator[Fuzzer]:
    started = Fuzzer(server)
    yield started
    started.close()


def test_every_answer_is_masks_or_a_refusal(fuzzer: Fuzzer, server: TritonServer) -> None:
    before = Census.of(server.pid)
    fuzzer.run(600, 0)
    assert [finding.line() for finding in fuzzer.tally.findings] == []
    after = Census.of(server.pid)
    assert after.processes == before.processes
    assert fuzzer.tally.sent == 600
    assert all(fuzzer.tally.total[outcome] > 20 for outcome in (ANSWERED, IN_WORDS, CUT))


def test_the_canary_notices_another_mask_and_another_score(fuzzer: Fuzzer) -> None:
    first = masks, scores = fuzzer.canary._expected[0]
    other = masks.copy()
    other[0, 0] = other[0, 0].replace(b"96", b"97", 1)
    for changed in ((other, scores), (masks, scores + 1e-3)):
        fuzzer.canary._expected[0] = changed
        with pytest.raises(WrongAnswer):
            fuzzer.canary.click()
        with pytest.raises(WrongAnswer):
            fuzzer.canary.sing()
    fuzzer.canary._expected[0] = masks, scores + 1e-6
    fuzzer.canary.sing()
    fuzzer.canary._expected[0] = first


def result(**arrays: Any) -> Any:
    """What tritonclient hands back."""
    outputs = [{"name": name} for name in arrays]
    return SimpleNamespace(get_response=lambda: {"outputs": outputs}, as_numpy=arrays.__getitem__)


def logits(value: float = 0, objects: int = 1, candidates: int = 3) -> Any:
    return np.full((1, objects, candidates, SIDE, SIDE), value, np.float16)


def case(expected: str) -> Case:
    right = request(DECODER, {**middle()})
    return Case("right", right, expected, Right(right, images=1, objects=1))


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
def test_a_result_is_held_to_the_contract(arrays: dict[str, Any], outcome: str) -> None:
    answer = Answer("200", result=result(**arrays))
    assert judge(answer, case(VALID), True, SIDE).outcome == outcome


@pytest.mark.parametrize(
    ("code", "text", "outcome"),
    [
        ("400", "point_labels is 7; accepted are 0 and 1", IN_WORDS),
        ("NOT_FOUND", "image_id not found", IN_WORDS),
        ("400", "", FINDING),
        ("400", "12", FINDING),
        ("500", "something went wrong", FINDING),
        ("INTERNAL", "the decoder failed on this request", FINDING),
        ("400", "cannot read /tmp/models/decoder.pt2", FINDING),
        ("400", "region triton_sam3_0a1b2c3d4e5f_3 is full", FINDING),
        ("400", "cannot identify <BytesIO object at 0x7f00deadbeef>", FINDING),
        ("400", "Traceback (most recent call last)", FINDING),
        ("500", "Unable to parse 'shape': attempt to access", SERVERS_OWN),
        (HUNG, "", FINDING),
        (CLOSED, "", FINDING),
    ],
)
def test_a_refusal_has_a_sentence_and_tells_nothing(code: str, text: str, outcome: str) -> None:
    assert judge(Answer(code, text), None, True, SIDE).outcome == outcome


def test_what_is_expected_counts() -> None:
    refusal = Answer("400", "it is not accepted")
    assert judge(refusal, case(REFUSED), True, SIDE).outcome == IN_WORDS
    assert judge(refusal, case(VALID), True, SIDE).outcome == FINDING
    full = Answer("UNAVAILABLE", "Exceeds maximum queue size")
    assert judge(full, case(VALID), True, SIDE).outcome == IN_WORDS
    answered = Answer("200", result=result(low_res_masks=logits()))
    assert judge(answered, case(REFUSED), True, SIDE).outcome == FINDING


def test_only_broken_framing_may_be_hung_up_on() -> None:
    assert judge(Answer(CLOSED), None, False, SIDE).outcome == CUT


@pytest.mark.parametrize(
    ("shape", "lethal"),
    [((1, 1, 1, 2), False), ((1, 2**31, 1, 2), False), ((1, 2**32, 2**31, 2), True),
     ((1, 0, 2**62, 2), True)],
)  # fmt: skip
def test_shapes_that_end_the_decoder_are_known(shape: tuple[int, ...], lethal: bool) -> None:
    assert is_lethal(Request(DECODER, (Tensor("point_coords", "FP32", shape),))) is lethal


def test_values_spelled_out_in_a_huge_shape_end_the_server_and_are_known() -> None:
    def spelled(*shape: int) -> Request:
        return Request(DECODER, (Tensor("point_coords", "FP32", shape, values=[0.5]),))

    assert is_lethal(spelled(1, 2**31, 1, 2))
    assert not is_lethal(spelled(1, 2000, 1, 2))


def test_a_callers_own_word_is_no_leak() -> None:
    answer = Answer("400", "unexpected input masks.py")
    assert judge(answer, None, True, SIDE).outcome == FINDING
    assert judge(answer, None, True, SIDE, b"masks.py").outcome == IN_WORDS


def test_strings_that_are_ranked_end_the_server_and_are_known() -> None:
    ranked = {"name": "image_id", "parameters": {"classification": 1}}
    assert is_lethal(Request(DECODER, (), outputs=(ranked,)))
    assert not is_lethal(Request(DECODER, (), outputs=({"name": "image_id"},)))


def test_numbers_as_protobuf_spells_them() -> None:
    assert [varint(n) for n in (0, 127, 300)] == [b"\0", b"\x7f", b"\xac\x02"]


def test_a_process_started_anew_is_noticed_and_written_down(tmp_path: Path) -> None:
    marks = [
        Census(frozenset({(1, started)}), 2 * 2**20, {"tritonserver": 2**20}, 0)
        for started in (1.0, 2.0)
    ]
    outcome = Outcome(4, 2, Tally(), marks, 0.9)
    assert not outcome.same_processes
    text = markdown(outcome, Provenance("make fuzz", "abc", "a machine", "versions", "0.1"))
    assert "NOT the same" in text
    assert "Findings: 0." in text
