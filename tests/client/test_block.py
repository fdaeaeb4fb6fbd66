"""A workflow step, by the rules of the block it was written for."""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import supervision as sv
from numpy.typing import NDArray

from benchmarks.reference import meta_predictor
from demo.prompts import iou
from export.check import load_photo
from server import TritonServer
from tests.conftest import DEMO_CHECKPOINT
from triton_sam3 import AsyncClient, Client
from triton_sam3.block import BLOCK_TYPE, block_calls, run_block
from triton_sam3.errors import PromptError
from triton_sam3.geometry import ImageLike, load_image
from triton_sam3.parsing import Box
from triton_sam3.prompts import Prompt
from triton_sam3.results import Segmentation

SIDE = 64
SCORES = (0.9, 0.2, 0.6, 0.8)


def logits_of(prompt: Prompt, width: int, height: int) -> NDArray[np.float32]:
    """The prompt's box filled, or a square about its first point; nothing for the class 'void'."""
    box = prompt.box or Box(*(c + d for d in (-20, 20) for c in prompt.points[0][:2]))
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    x, y = x / SIDE * width, y / SIDE * height
    inside = (x > box.x_min) & (x < box.x_max) & (y > box.y_min) & (y < box.y_max)
    return np.where(inside & (prompt.class_name != "void"), 8, -8).astype(np.float32)


class Boxes:
    """A segmenter without a network: its masks are the prompts' boxes, its scores are known."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def segment(
        self,
        image: ImageLike,
        *,
        prompts: Sequence[Prompt],
        threshold: float = 0.0,
        multimask_output: bool = True,
    ) -> Segmentation:
        self.calls.append({"threshold": threshold, "multimask_output": multimask_output})
        height, width = load_image(image).shape[:2]
        planes = [logits_of(prompt, width, height) for prompt in prompts]
        return Segmentation.from_logits(
            np.array(planes, np.float32).reshape(-1, SIDE, SIDE),
            np.array(SCORES[: len(prompts)], np.float32),
            prompts,
            (width, height),
            threshold=threshold,
        )


@pytest.fixture
def segmenter() -> Boxes:
    return Boxes()


@pytest.fixture
def image() -> NDArray[np.uint8]:
    return np.zeros((240, 320, 3), np.uint8)


def step(**fields: Any) -> dict[str, Any]:
    return {"type": BLOCK_TYPE, "name": "segmenter", "images": "$inputs.image", **fields}


def detections(*names: str) -> sv.Detections:
    boxes = [[20.0 + 60 * i, 30, 70 + 60 * i, 110] for i in range(len(names))]
    return sv.Detections(
        xyxy=np.array(boxes, np.float32).reshape(-1, 4),
        confidence=np.full(len(names), 0.5),
        class_id=np.arange(len(names)) + 5,
        data={
            "class_name": np.array(names, np.str_),
            "detection_id": np.array([f"id-{name}" for name in names], np.str_),
        },
    )


@pytest.mark.semantic(
    "block",
    'by default `threshold` 0.0, `multimask_output` true; points are one object, "foreground", -1',
    "the block's rules",
)
def test_literal_points(segmenter: Boxes, image: NDArray[np.uint8]) -> None:
    points = [{"x": 100, "y": 80, "positive": True}, [10, 10, False]]
    ((result,),) = [run_block(segmenter, step(points=points), image)]
    found = result["predictions"]
    assert isinstance(found, sv.Detections)
    assert found["class_name"].tolist() == ["foreground"]
    assert found.class_id.tolist() == [-1]
    assert segmenter.calls == [{"threshold": 0.0, "multimask_output": True}]


def test_points_are_read_as_the_block_reads_them(
    segmenter: Boxes, image: NDArray[np.uint8]
) -> None:
    points = [
        {"x": 100, "y": 80, "positive": 2, "id": "p1"},
        {"x": 10, "y": 10, "positive": None},
        {"x": 5, "y": 5, "label": "dog"},
    ]
    (call,) = block_calls(step(points=points), image)
    assert [tuple(point) for point in call.prompts[0].points] == [
        (100, 80, True),
        (10, 10, False),
        (5, 5, True),
    ]
    with pytest.raises(PromptError, match="is missing 'y'"):
        run_block(segmenter, step(points=[{"x": 100}]), image)


@pytest.mark.semantic(
    "block",
    "selectors stand for given values; class and class id are carried",
    "the block's rules",
)
def test_selectors_are_resolved_by_name_and_in_full(
    segmenter: Boxes, image: NDArray[np.uint8]
) -> None:
    definition = step(
        points="$inputs.points",
        boxes="$steps.detector.predictions",
        threshold="$inputs.least",
        multimask_output="$inputs.many",
    )
    inputs = {
        "image": image,
        "points": [(300, 200)],
        "$steps.detector.predictions": detections("cat", "dog"),
        "$inputs.least": 0.3,
        "many": False,
    }
    (result,) = run_block(segmenter, json.loads(json.dumps(definition)), inputs=inputs)
    found = result["predictions"]
    assert segmenter.calls == [{"threshold": 0.3, "multimask_output": False}]
    assert found["class_name"].tolist() == ["cat", "foreground"]  # the dog scored 0.2
    assert found.class_id.tolist() == [5, -1]
    assert found["detection_id"][0] == "id-cat"


def test_detections_have_the_fields_of_the_block(
    segmenter: Boxes, image: NDArray[np.uint8]
) -> None:
    (result,) = run_block(segmenter, step(points=[(60, 60)]), image)
    data = result["predictions"].data
    assert data["parent_id"].tolist() == data["root_parent_id"].tolist() == ["image"]
    for name in ("image", "parent", "root_parent"):
        assert data[f"{name}_dimensions"].tolist() == [[240, 320]]
    for name in ("parent", "root_parent"):
        assert data[f"{name}_coordinates"].tolist() == [[0, 0]]
    assert data["prediction_type"].tolist() == ["instance-segmentation"]


def test_serialized_results_are_json(segmenter: Boxes, image: NDArray[np.uint8]) -> None:
    (result,) = run_block(
        segmenter,
        step(boxes="$steps.m.predictions"),
        image,
        {"$steps.m.predictions": detections("cat")},
        serialize_results=True,
    )
    response = json.loads(json.dumps(result))["predictions"]
    assert response["image"] == {"width": 320, "height": 240}
    (prediction,) = response["predictions"]
    assert prediction["rle_mask"]["size"] == [240, 320]  # a polygon would lose holes and regions
    assert (prediction["x"], prediction["y"]) == pytest.approx((45, 70), abs=320 / SIDE)
    assert (prediction["class"], prediction["class_id"]) == ("cat", 5)
    assert (prediction["detection_id"], prediction["parent_id"]) == ("id-cat", "image")


@pytest.mark.semantic(
    "block", "a box outside the image has no mask, the others have theirs", "the block's rules"
)
def test_a_box_outside_the_image_has_no_mask(segmenter: Boxes, image: NDArray[np.uint8]) -> None:
    boxes = detections("left", "inside", "below")
    boxes.xyxy[0] = (-60, 30, -10, 110)
    boxes.xyxy[2] = (20, 241, 70, 300)
    results = run_block(
        segmenter, step(boxes="$inputs.boxes"), [image] * 2, {"boxes": [boxes, boxes[[0, 2]]]}
    )
    names = [result["predictions"]["class_name"].tolist() for result in results]
    assert names == [["inside"], []]


@pytest.mark.semantic(
    "block", "boxes go with their image, points with every image", "the block's rules"
)
def test_batches_pair_boxes_with_images_and_share_points(
    segmenter: Boxes, image: NDArray[np.uint8]
) -> None:
    boxes = [detections("cat", "dog"), detections(), detections("cow")]
    results = run_block(
        segmenter, step(points=[(300, 200)], boxes="$inputs.boxes"), [image] * 3, {"boxes": boxes}
    )
    names = [result["predictions"]["class_name"].tolist() for result in results]
    assert names == [["cat", "dog", "foreground"], ["foreground"], ["cow", "foreground"]]
    parents = [set(result["predictions"]["parent_id"]) for result in results]
    assert parents == [{"image.[0]"}, {"image.[1]"}, {"image.[2]"}]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda found: found,
        lambda found: [found],
        lambda found: {"predictions": found},
        lambda found: [tuple(box) for box in found.xyxy],
    ],
    ids=["detections", "batch of one", "response", "list of boxes"],
)
def test_a_single_image_takes_boxes_in_any_form(
    segmenter: Boxes, image: NDArray[np.uint8], wrap: Callable[[sv.Detections], Any]
) -> None:
    inputs = {"boxes": wrap(detections("cat", "dog"))}
    (result,) = run_block(segmenter, step(boxes="$inputs.boxes"), image, inputs)
    assert len(result["predictions"]) == 2


def test_a_single_value_of_boxes_applies_to_every_image(
    segmenter: Boxes, image: NDArray[np.uint8]
) -> None:
    results = run_block(
        segmenter, step(boxes="$inputs.boxes"), [image] * 2, {"boxes": detections("cat")}
    )
    assert [len(result["predictions"]) for result in results] == [1, 1]


@pytest.mark.semantic("block", "boxes given but empty are an empty result", "the block's rules")
def test_no_detections_is_an_empty_result(segmenter: Boxes, image: NDArray[np.uint8]) -> None:
    inputs = {"boxes": detections()}
    (found,) = run_block(segmenter, step(boxes="$inputs.boxes"), image, inputs)
    assert len(found["predictions"]) == 0
    (plain,) = run_block(
        segmenter, step(boxes="$inputs.boxes"), image, inputs, serialize_results=True
    )
    assert plain["predictions"] == {"image": {"width": 320, "height": 240}, "predictions": []}


@pytest.mark.semantic("block", "a mask without a pixel is left out", "the block's rules")
@pytest.mark.parametrize("serialize_results", [False, True])
def test_empty_masks_are_left_out(
    segmenter: Boxes, image: NDArray[np.uint8], serialize_results: bool
) -> None:
    (result,) = run_block(
        segmenter,
        step(boxes="$inputs.boxes"),
        image,
        {"boxes": detections("void", "dog")},
        serialize_results=serialize_results,
    )
    found = result["predictions"]
    assert len(found["predictions"] if serialize_results else found) == 1


@pytest.mark.semantic(
    "block",
    "neither points nor boxes, or a wrong value, is an error that says so",
    "the block's rules",
)
@pytest.mark.parametrize(
    ("definition", "inputs", "message"),
    [
        (step(), {}, r"^there is nothing to segment: give points, boxes or both"),
        (step(points=[]), {}, r"^there is nothing to segment"),
        (step(points=[{"x": 320}]), {}, r"^point {'x': 320} is missing 'y'"),
        (step(points="$inputs.clicks"), {}, r"^points is '\$inputs.clicks', which has no value: "),
        (step(boxes="$steps.a.predictions"), {"a": 1}, r"pass inputs={'\$steps.a.predictions': …}"),
        (step(points="320,240"), {}, r"a string must be a selector such as '\$inputs.points'"),
        (step(points=[(1, 2)], threshold="0.5"), {}, r"^threshold is '0.5': a string must be a"),
        (step(points=[(1, 2)], threshold=True), {}, r"^threshold must be a number, got True"),
        (step(points=[(1, 2)], threshold=None), {}, r"^threshold must be a number, got None"),
        (step(points=[(1, 2)], multimask_output=3), {}, r"^multimask_output must be true or false"),
        ({"type": "roboflow_core/sam3@v1"}, {}, r"type is 'roboflow_core/sam3@v1', but only 'rob"),
        (
            {"version": "1.0", "steps": [step()]},
            {},
            r"whole workflow: pass only its step of type",
        ),
    ],
)
def test_invalid_steps_are_rejected(
    segmenter: Boxes,
    image: NDArray[np.uint8],
    definition: dict[str, Any],
    inputs: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(PromptError, match=message):
        run_block(segmenter, definition, image, inputs)
    assert segmenter.calls == []


def test_an_async_client_is_rejected(image: NDArray[np.uint8]) -> None:
    client: Any = AsyncClient("http://127.0.0.1:9")
    with pytest.raises(TypeError, match="pass a Client, not an AsyncClient"):
        run_block(client, step(points=[(1, 2)]), image)


def test_without_supervision_nothing_is_sent(
    segmenter: Boxes, image: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match=r"pip install 'triton-sam3\[supervision\]'"):
        run_block(segmenter, step(points=[(40, 30)]), image)
    assert segmenter.calls == []
    assert run_block(segmenter, step(points=[(40, 30)]), image, serialize_results=True)


def test_a_step_without_images_is_rejected(segmenter: Boxes) -> None:
    with pytest.raises(PromptError, match=r"^images is '\$inputs.image', which has no value"):
        run_block(segmenter, step(points=[(1, 2)]))
    with pytest.raises(PromptError, match=r"^the step has no 'images', and none were passed"):
        run_block(segmenter, {"type": BLOCK_TYPE, "points": [(1, 2)]})


def test_boxes_for_another_number_of_images_are_rejected(
    segmenter: Boxes, image: NDArray[np.uint8]
) -> None:
    definition = step(boxes="$inputs.boxes")
    with pytest.raises(PromptError, match=r"^got boxes for 1 images, but 2 images: pass one"):
        run_block(segmenter, definition, [image] * 2, {"boxes": [detections("cat")]})
    with pytest.raises(PromptError, match=r"^there is nothing to segment"):
        run_block(segmenter, definition, [image] * 2, {"boxes": [detections("cat"), None]})
    assert segmenter.calls == []


@pytest.fixture(scope="module")
def meta() -> Any:
    return meta_predictor(DEMO_CHECKPOINT)


@pytest.mark.semantic(
    "block", "a served step's masks are the best by predicted IoU", "Meta's predictor"
)
@pytest.mark.parametrize("multimask", [True, False])
def test_a_served_step_answers_as_metas_predictor(
    multimask: bool, meta: Any, server: TritonServer
) -> None:
    """Boxes and then the points, each asked of Meta's predictor; the lowest score is dropped."""
    photo = load_photo("coffee", meta.model.image_size)  # the very same pixels on both sides
    clicks = [{"x": 120, "y": 90, "positive": True}, (20, 200, False)]
    found = detections("cup", "spoon")
    meta.set_image(photo)
    questions = [{"box": box} for box in found.xyxy]
    coords, labels = np.array([[120, 90], [20, 200]]), np.array([1, 0])
    questions.append({"point_coords": coords, "point_labels": labels})
    answers = [meta.predict(**one, multimask_output=multimask) for one in questions]
    best = [(scores[scores.argmax()], masks[scores.argmax()] > 0) for masks, scores, _ in answers]
    least, second = sorted(float(score) for score, _ in best)[:2]
    assert second - least > 0.01
    expected = [(score, mask) for score, mask in best if score > least]
    definition = step(
        points=clicks,
        boxes="$steps.detector.predictions",
        threshold=(least + second) / 2,
        multimask_output=multimask,
    )
    with Client(server.grpc_url) as client:
        inputs = {"$steps.detector.predictions": found}
        (result,) = run_block(client, definition, photo, inputs)
    answer = result["predictions"]
    names = np.array(["cup", "spoon", "foreground"])[[score > least for score, _ in best]]
    assert answer["class_name"].tolist() == names.tolist()
    for mask, score, (meta_score, meta_mask) in zip(
        answer.mask, answer.confidence, expected, strict=True
    ):
        assert iou(mask, meta_mask) >= 0.999
        assert score == pytest.approx(float(meta_score), abs=2e-3)
