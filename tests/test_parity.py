"""Masks of the served demo model, through the client, are those of Meta's predictor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.reference import meta_predictor
from demo.prompts import iou
from export.check import load_photo
from server import TritonServer
from tests.conftest import DEMO_CHECKPOINT
from tests.meta import Array, predict
from triton_sam3 import Client, Prompt

MIN_IOU = 0.999
SCORE_TOLERANCE = 2e-3
POINTS = [(120.0, 90.0, 1), (150.0, 120.0, 1), (20.0, 200.0, 0)]
BOX = (60.0, 40.0, 200.0, 190.0)
CASES: dict[str, dict[str, Any]] = {
    "point": {"points": POINTS[:1]},
    "points": {"points": POINTS},
    "box": {"box": BOX},
    "box and points": {"points": POINTS, "box": BOX},
}


@pytest.fixture(scope="module")
def meta() -> Any:
    """Meta's predictor, to be told its image."""
    return meta_predictor(DEMO_CHECKPOINT)


@pytest.fixture(scope="module", params=["coffee", "astronaut", "chelsea"])
def photo(request: pytest.FixtureRequest, meta: Any) -> NDArray[np.uint8]:
    """Already at the encoder's size: what is resized to it, Meta does not round to octets."""
    pixels = load_photo(request.param, meta.model.image_size)
    meta.set_image(pixels)
    return pixels


class Best:
    """What Meta's predictor says, of the candidate with the highest score."""

    def __init__(
        self, meta: Any, prompt: dict[str, Any], multimask: bool, mask: Array | None = None
    ) -> None:
        masks, scores, logits = predict(meta, prompt, multimask, mask)
        best = int(scores.argmax())
        self.mask: NDArray[np.bool_] = masks[best] > 0
        self.score = float(scores[best])
        self.logits = logits[best : best + 1]


def assert_same(answer: Any, expected: Best) -> None:
    """One object's mask and score."""
    assert expected.mask.any()
    assert iou(answer[0].mask, expected.mask) >= MIN_IOU
    assert answer[0].score == pytest.approx(expected.score, abs=SCORE_TOLERANCE)


@pytest.mark.semantic(
    "masks",
    "served masks of points, box, both, each refined, with and without `multimask_output`: "
    "IoU ≥ 0.999",
    "Meta's predictor",
)
@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_a_served_mask_and_its_refinement_are_the_same_as_metas(
    server: TritonServer, meta: Any, photo: NDArray[np.uint8], case: str, multimask: bool
) -> None:
    """Each side refines its own first mask, ours in 16 bits."""
    prompt = CASES[case]
    expected = Best(meta, prompt, multimask)
    options: dict[str, Any] = {"multimask_output": multimask, "threshold": -1}
    with Client(server.grpc_url) as client:
        first = client.segment(photo, prompts=Prompt(**prompt), **options)
        assert_same(first, expected)
        again = Prompt(**prompt, mask=first.logits[0])
        refined = client.segment(photo, prompts=again, **options)
    assert_same(refined, Best(meta, prompt, multimask, expected.logits))


@pytest.mark.semantic("masks", "each click's mask on an open view: IoU ≥ 0.999", "Meta's predictor")
def test_clicks_on_a_view_give_the_same_as_metas_predictor(
    server: TritonServer, meta: Any, photo: NDArray[np.uint8]
) -> None:
    """The first of three masks; then with all points, the last logits and one mask."""
    with Client(server.grpc_url) as client, client.open(photo) as view:
        clicked = [view.click(x, y, positive=bool(label)) for x, y, label in POINTS]
    expected = Best(meta, {"points": POINTS[:1]}, multimask=True)
    assert_same(clicked[0], expected)
    for count in (2, 3):
        expected = Best(meta, {"points": POINTS[:count]}, multimask=False, mask=expected.logits)
        assert_same(clicked[count - 1], expected)
