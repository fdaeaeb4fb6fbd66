"""Clicking on an image the server keeps."""

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray

from server import TritonServer
from tests.client.statistics import decodings, encodings
from tests.client.wire import wire
from triton_sam3 import Client, ClientUnusable, Prompt, PromptError

Pixels = NDArray[np.uint8]
Fresh = Callable[[], Pixels]


@pytest.mark.semantic(
    "session", "a click adds to the object and refines the last answer", "the contract"
)
def test_a_click_adds_to_the_object_and_refines_the_last_answer(url: str, coins: Pixels) -> None:
    with Client(url) as client, client.open(coins) as view:
        first = view.click(110, 80)
        second = view.click(60, 200, positive=False)
        alone = client.segment(coins, points=[(110, 80)], threshold=-1)
        refined = Prompt([(110, 80), (60, 200, False)], mask=first.logits[0])
        together = client.segment(coins, prompts=refined, threshold=-1, multimask_output=False)
    np.testing.assert_array_equal(first.logits, alone.logits)
    np.testing.assert_array_equal(second.logits, together.logits)
    assert len(first) == len(second) == 1


@pytest.mark.semantic("session", "undo restores the earlier state exactly", "equality")
def test_undo_restores_the_earlier_state_exactly(url: str, coins: Pixels) -> None:
    with Client(url) as client, client.open(coins) as view:
        first = view.click(110, 80)
        second = view.click(60, 200, positive=False)
        assert view.undo() is first
        again = view.click(60, 200, positive=False)
        np.testing.assert_array_equal(again.logits, second.logits)
        view.undo()
        assert len(view.undo()) == 0
        assert len(view.undo()) == 0  # nothing left to undo
        np.testing.assert_array_equal(view.click(110, 80).logits, first.logits)


def test_redo_restores_what_was_undone_until_another_click(url: str, coins: Pixels) -> None:
    with Client(url) as client, client.open(coins) as view:
        assert len(view.redo()) == 0  # nothing was undone
        first, second = view.click(110, 80), view.click(60, 200, positive=False)
        assert view.redo() is second
        assert (view.undo(), len(view.undo())) == (first, 0)
        assert (view.redo(), view.redo(), view.redo()) == (first, second, second)
        view.undo()
        third = view.click(120, 90)
        assert view.redo() is third
        assert view.undo() is first
        view.reset()
        assert len(view.redo()) == 0


def test_undo_recomputes_a_result_that_nobody_holds(url: str, coins: Pixels) -> None:
    with Client(url) as client, client.open(coins) as view:
        first = view.click(110, 80)
        masks, scores, detections = first.masks.copy(), first.scores, first.detection_ids
        held = weakref.ref(first)
        del first
        view.click(60, 200, positive=False)
        gc.collect()
        assert held() is None
        undone = view.undo()
    np.testing.assert_array_equal(undone.masks, masks)
    np.testing.assert_array_equal(undone.scores, scores)
    assert undone.detection_ids == detections


@pytest.mark.semantic("session", "reset starts another object", "the contract")
def test_reset_starts_another_object(url: str, coins: Pixels) -> None:
    with Client(url) as client, client.open(coins) as view:
        first = view.click(110, 80)
        view.click(60, 200)
        assert len(view.reset()) == 0
        np.testing.assert_array_equal(view.click(110, 80).logits, first.logits)


def test_segmenting_in_a_view_does_not_affect_the_clicked_object(url: str, coins: Pixels) -> None:
    with Client(url) as client, client.open(coins) as view:
        first = view.click(110, 80)
        boxes = view.segment(boxes=[(95, 60, 140, 110), (10, 20, 70, 80)], threshold=-1)
        second = view.click(60, 200)
        assert view.undo() is first
    with Client(url) as client, client.open(coins) as view:
        view.click(110, 80)
        np.testing.assert_array_equal(view.click(60, 200).logits, second.logits)
    assert len(boxes) == 2
    assert view.size == (384, 303)


@pytest.mark.semantic(
    "session",
    "a click on an open view does not move the encoder's inference count",
    "Triton's own counters",
)
def test_clicking_encodes_nothing(url: str, fresh: Fresh, server: TritonServer) -> None:
    image = fresh()
    before = encodings(server)
    with Client(url) as client, client.open(image) as view:
        assert encodings(server) == before + 1
        clicks = decodings(server)
        for x in range(50, 100, 10):
            view.click(x, 80)
        assert (encodings(server), decodings(server)) == (before + 1, clicks + 5)
        with client.open(image) as other:
            other.click(110, 80)
        client.segment(image, points=[(110, 80)])
        assert encodings(server) == before + 1


@pytest.mark.semantic("session", "a click on an open view sends no image bytes", "bytes counted")
def test_a_click_sends_no_image(url: str, fresh: Fresh) -> None:
    with wire(url) as counted, Client(counted.url) as client:
        served = client.status().served
        assert served is not None
        image_bytes, plane_bytes = 3 * served.image_side**2, 2 * served.mask_side**2
        before = counted.sent
        with client.open(fresh()) as view:
            assert counted.sent - before > image_bytes
            before = counted.sent
            view.click(110, 80)
            assert counted.sent - before < 2_000
            before = counted.sent
            view.click(60, 200)
            assert plane_bytes < counted.sent - before < plane_bytes + 2_000


def test_clicks_of_several_threads_all_count(url: str, coins: Pixels) -> None:
    with Client(url) as client, client.open(coins) as view, ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda x: view.click(x, 80), range(50, 130, 10)))
        assert len({id(result) for result in results}) == 8
        left = [view.undo() for _ in range(8)]
    assert [len(result) for result in left] == [1] * 7 + [0]
    assert {id(result) for result in left[:7]} < {id(result) for result in results}


def test_a_click_outside_the_image_changes_nothing(url: str, coins: Pixels) -> None:
    with Client(url) as client, client.open(coins) as view:
        first = view.click(110, 80)
        for x, y in ((-1, 5), (385, 5), (5, 304), (float("nan"), 5)):
            with pytest.raises(PromptError):
                view.click(x, y)
        second = view.click(60, 200)
        assert view.undo() is first
        assert second is not first


def test_a_closed_view_raises_client_unusable(url: str, coins: Pixels) -> None:
    with Client(url) as client:
        with client.open(coins) as view:
            view.click(110, 80)
        with pytest.raises(ClientUnusable, match="view is closed"):
            view.click(110, 80)
        with pytest.raises(ClientUnusable, match="view is closed"):
            view.segment(points=[(110, 80)])
        for change in (view.undo, view.redo, view.reset):
            with pytest.raises(ClientUnusable, match="view is closed"):
                change()


def test_an_object_keeps_its_detection_id_until_another_is_started(url: str, coins: Pixels) -> None:
    with Client(url) as client, client.open(coins) as view:
        found = [view.click(110, 80), view.click(60, 200, positive=False), view.undo()]
        (same,) = {result.detection_ids for result in found}
        assert view.click(120, 90).detection_ids == same
        view.reset()
        assert view.click(110, 80).detection_ids != same


def test_a_click_on_the_far_corner_is_inside(url: str, coins: Pixels) -> None:
    with Client(url) as client, client.open(coins) as view:
        assert len(view.click(*view.size)) == 1
