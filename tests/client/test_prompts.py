"""Which prompts a call means, and how they go on the wire."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import supervision as sv
import torch
from hypothesis import given
from hypothesis import strategies as st

from triton_sam3.errors import PromptError
from triton_sam3.parsing import Box, Point
from triton_sam3.prompts import Prompt, pack, parse_boxes, to_prompts

WIDTH, HEIGHT, MASK_SIDE = 640, 480, 12

DETECTIONS = [
    ((10.0, 20.0, 40.0, 60.0), 3, "cat", "id-1"),
    ((100.0, 110.0, 300.5, 220.25), 0, "dog", "id-2"),
]


def as_supervision() -> sv.Detections:
    boxes, ids, names, detection_ids = zip(*DETECTIONS, strict=True)
    return sv.Detections(
        xyxy=np.array(boxes, np.float32),
        confidence=np.array([0.9, 0.8]),
        class_id=np.array(ids),
        data={"class_name": np.array(names), "detection_id": np.array(detection_ids)},
    )


def as_roboflow() -> dict[str, Any]:
    predictions = [
        {
            "x": (x_min + x_max) / 2,
            "y": (y_min + y_max) / 2,
            "width": x_max - x_min,
            "height": y_max - y_min,
            "confidence": 0.9,
            "class": name,
            "class_id": class_id,
            "detection_id": detection_id,
        }
        for (x_min, y_min, x_max, y_max), class_id, name, detection_id in DETECTIONS
    ]
    return {"image": {"width": WIDTH, "height": HEIGHT}, "predictions": predictions}


def as_dicts() -> list[dict[str, Any]]:
    keys = ("x_min", "y_min", "x_max", "y_max")
    return [
        {
            **dict(zip(keys, box, strict=True)),
            "class_name": name,
            "class_id": np.int64(class_id),
            "detection_id": detection_id,
        }
        for box, class_id, name, detection_id in DETECTIONS
    ]


@pytest.mark.parametrize(
    "boxes",
    [
        as_supervision(),
        as_roboflow(),
        as_roboflow()["predictions"],
        as_dicts(),
        {"predictions": as_supervision()},
        {"predictions": as_roboflow()},
    ],
    ids=["supervision", "roboflow", "predictions", "dicts", "block output", "its JSON"],
)
def test_boxes_carry_their_detection(boxes: Any) -> None:
    prompts = parse_boxes(boxes)
    carried = [(tuple(p.box or ()), p.class_id, p.class_name, p.detection_id) for p in prompts]
    assert carried == DETECTIONS
    assert all(p.points == () and p.mask is None for p in prompts)


def test_boxes_without_a_class_are_foreground() -> None:
    bare = sv.Detections(xyxy=np.array([[1, 2, 3, 4]]))
    for boxes in ([[1, 2, 3, 4]], np.array([[1, 2, 3, 4]]), ((1, 2, 3, 4),), bare):
        (prompt,) = parse_boxes(boxes)
        assert prompt.box == Box(1, 2, 3, 4)
        assert (prompt.class_id, prompt.class_name) == (-1, "foreground")
        assert prompt.detection_id is None


@pytest.mark.parametrize(
    "empty",
    [[], (), np.zeros((0, 4)), sv.Detections.empty(), {"predictions": []}],
    ids=["list", "tuple", "array", "supervision", "roboflow"],
)
def test_empty_boxes_give_no_prompts(empty: Any) -> None:
    assert to_prompts(boxes=empty) == ()
    assert to_prompts([], empty) == ()
    (prompt,) = to_prompts([(3, 4)], empty)
    assert prompt.points == (Point(3, 4),)


@pytest.mark.parametrize("boxes", [[1, 2, 3, 4], {"x": 1}, "box", 5, (1.5, 2, 3, 4)])
def test_boxes_that_are_not_a_list_are_rejected(boxes: Any) -> None:
    with pytest.raises(PromptError, match=r"^boxes must be a list of boxes, got "):
        parse_boxes(boxes)


@pytest.mark.parametrize("points", [None, [], np.zeros((0, 2))])
def test_neither_points_nor_boxes_is_an_error(points: Any) -> None:
    with pytest.raises(PromptError, match=r"^there is nothing to segment: give points, boxes or"):
        to_prompts(points)


def test_boxes_come_first_and_all_points_are_one_object() -> None:
    prompts = to_prompts([(1, 2), (3, 4, False)], as_supervision())
    assert [prompt.class_name for prompt in prompts] == ["cat", "dog", "foreground"]
    assert prompts[2].points == (Point(1, 2, True), Point(3, 4, False))
    assert prompts[2].class_id == -1
    assert prompts[2].box is None


def test_prompts_are_frozen_and_replaceable() -> None:
    prompt = Prompt([(1, 2)], (0, 0, 5, 5), class_name="cup", class_id=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        prompt.class_name = "mug"  # type: ignore[misc]
    changed = dataclasses.replace(prompt, points=(*prompt.points, Point(3, 4, False)))
    assert changed.points == (Point(1, 2), Point(3, 4, False))
    assert (changed.box, changed.class_name, changed.class_id) == (prompt.box, "cup", 2)


def test_an_empty_prompt_is_rejected() -> None:
    with pytest.raises(PromptError, match="needs points, a box or a mask, but this one has none"):
        Prompt(points=[], class_name="cup")


def test_pack_places_the_box_before_the_points_and_pads_the_end() -> None:
    prompts = [
        Prompt(points=[(320, 120)]),
        Prompt(box=(64, 48, 128, 96), points=[(80, 60), (90, 70, False)]),
        Prompt(box=(0, 0, WIDTH, HEIGHT)),
    ]
    packed = pack(prompts, WIDTH, HEIGHT, MASK_SIDE)
    assert packed.point_coords.shape == (3, 4, 2)
    assert packed.point_coords.dtype == np.float32
    assert packed.point_labels.dtype == np.int32
    assert packed.point_labels.tolist() == [[1, -1, -1, -1], [2, 3, 1, 0], [2, 3, -1, -1]]
    np.testing.assert_allclose(packed.point_coords[0, 0], [0.5, 0.25])
    np.testing.assert_allclose(
        packed.point_coords[1], [[0.1, 0.1], [0.2, 0.2], [0.125] * 2, [90 / 640, 70 / 480]]
    )
    np.testing.assert_array_equal(packed.point_coords[2, :2], [[0, 0], [1, 1]])
    assert packed.mask_input is None


def test_pack_marks_missing_masks_with_nan() -> None:
    logits = np.random.default_rng(0).standard_normal((MASK_SIDE, MASK_SIDE)).astype(np.float16)
    prompts = [Prompt(points=[(1, 1)]), Prompt(mask=logits), Prompt(box=(0, 0, 9, 9), mask=logits)]
    packed = pack(prompts, WIDTH, HEIGHT, MASK_SIDE)
    assert packed.mask_input is not None
    assert packed.mask_input.dtype == np.float16
    assert np.isnan(packed.mask_input[0]).all()
    np.testing.assert_array_equal(packed.mask_input[1], logits)
    np.testing.assert_array_equal(packed.mask_input[2], logits)
    assert packed.point_labels.tolist() == [[1, -1], [-1, -1], [2, 3]]


def test_pack_of_only_masks_has_a_column_of_padding() -> None:
    packed = pack([Prompt(mask=np.zeros((8, 8)))], WIDTH, HEIGHT, 8)
    assert packed.point_labels.tolist() == [[-1]]
    assert packed.point_coords.shape == (1, 1, 2)


def test_pack_rejects_a_mask_of_another_size() -> None:
    with pytest.raises(PromptError, match="mask of 8×8 does not fit this server's masks of 12×12"):
        pack([Prompt(mask=np.zeros((8, 8)))], WIDTH, HEIGHT, MASK_SIDE)


def test_boxes_that_extend_beyond_the_image_are_clipped() -> None:
    packed = pack([Prompt(box=(-50, -0.5, 1e6, 480.5))], WIDTH, HEIGHT, MASK_SIDE)
    np.testing.assert_array_equal(packed.point_coords[0], [[0, 0], [1, 1]])


@pytest.mark.parametrize(
    "box", [(-9, 0, -1, 9), (641, 0, 700, 9), (0, 481, 9, 500), (0, -9, 9, -1)]
)
def test_boxes_outside_the_image_are_rejected(box: Any) -> None:
    with pytest.raises(PromptError, match=r"^box \(.*\) lies entirely outside the 640×480 image"):
        pack([Prompt(box=box)], WIDTH, HEIGHT, MASK_SIDE)


@pytest.mark.parametrize("point", [(640.5, 3), (3, 481), (-0.25, 3), (3, -1)])
def test_points_outside_the_image_are_rejected(point: tuple[float, float]) -> None:
    with pytest.raises(PromptError) as caught:
        pack([Prompt(points=[(1, 1), point])], WIDTH, HEIGHT, MASK_SIDE)
    assert str(caught.value) == (
        f"point ({float(point[0])}, {float(point[1])}) is outside the image: "
        "x must be within 0…640, y within 0…480"
    )


def test_points_on_the_far_edge_are_inside() -> None:
    packed = pack([Prompt(points=[(WIDTH, HEIGHT)])], WIDTH, HEIGHT, MASK_SIDE)
    np.testing.assert_array_equal(packed.point_coords[0, 0], [1, 1])


inside = st.tuples(st.floats(0, WIDTH), st.floats(0, HEIGHT), st.booleans())
spans = st.tuples(st.floats(-50, 500), st.floats(-40, 400), st.floats(60, 900), st.floats(50, 900))


@st.composite
def some_prompts(draw: st.DrawFn) -> list[Prompt]:
    prompts = []
    for _ in range(draw(st.integers(1, 6))):
        points = draw(st.lists(inside, max_size=4))
        box = None
        if not points or draw(st.booleans()):
            x, y, width, height = draw(spans)
            box = (x, y, x + width, y + height)
        prompts.append(Prompt(points, box))
    return prompts


@given(some_prompts())
def test_packed_tokens_can_be_turned_back_into_the_prompts(prompts: list[Prompt]) -> None:
    packed = pack(prompts, WIDTH, HEIGHT, MASK_SIDE)
    assert ((packed.point_coords >= 0) & (packed.point_coords <= 1)).all()
    size = np.array([WIDTH, HEIGHT])
    for prompt, coords, labels in zip(
        prompts, packed.point_coords, packed.point_labels, strict=True
    ):
        used = int((labels != -1).sum())
        assert (labels[used:] == -1).all()
        pixels = list(coords[:used] * size)
        kinds = labels[:used].tolist()
        if prompt.box is not None:
            assert kinds[:2] == [2, 3]
            corners = np.clip(np.reshape(prompt.box, (2, 2)), 0, size)
            np.testing.assert_allclose(pixels[:2], corners, atol=1e-3)
            pixels, kinds = pixels[2:], kinds[2:]
        assert kinds == [int(point.positive) for point in prompt.points]
        expected = [(point.x, point.y) for point in prompt.points]
        np.testing.assert_allclose(
            np.reshape(pixels, (-1, 2)), np.reshape(expected, (-1, 2)), atol=1e-3
        )


@given(some_prompts(), st.integers(0, 5))
def test_a_prompts_tokens_do_not_depend_on_its_neighbours(prompts: list[Prompt], pick: int) -> None:
    row = pick % len(prompts)
    alone = pack([prompts[row]], WIDTH, HEIGHT, MASK_SIDE)
    together = pack(prompts, WIDTH, HEIGHT, MASK_SIDE)
    tokens = alone.point_labels.shape[1]
    np.testing.assert_array_equal(together.point_labels[row, :tokens], alone.point_labels[0])
    np.testing.assert_array_equal(together.point_coords[row, :tokens], alone.point_coords[0])
    assert (together.point_labels[row, tokens:] == -1).all()


@pytest.mark.parametrize(
    ("box", "corners"),
    [
        ((64, 48, 64, 96), [[0.1, 0.1], [0.1, 0.2]]),
        ((640, 48, 700, 96), [[1, 0.1], [1, 0.2]]),
        ((-9, -9, 0, 0), [[0, 0], [0, 0]]),
    ],
)
def test_a_box_may_be_a_line_or_a_point(box: Any, corners: list[list[float]]) -> None:
    packed = pack([Prompt(box=box)], WIDTH, HEIGHT, MASK_SIDE)
    np.testing.assert_allclose(packed.point_coords[0], corners)


@pytest.mark.parametrize("wrong", [(5, 5, 1, 1), (5, 5), (float("nan"), 0, 1, 1)])
def test_the_invalid_one_of_several_boxes_is_named_by_its_index(wrong: tuple[float, ...]) -> None:
    with pytest.raises(PromptError, match=r"^boxes\[1\]: "):
        parse_boxes([(0, 0, 5, 5), wrong, (0, 0, 5, 5)])
    fine = np.array([(0, 0, 5, 5)] * 3)
    fine[2] = 9, 9, 5, 5
    with pytest.raises(PromptError, match=r"^boxes\[2\]: .*: x_min must be at most"):
        parse_boxes(sv.Detections(xyxy=fine))


class Boxes:
    """As other libraries have them: corners in a tensor, and a `data` of their own."""

    def __init__(self) -> None:
        self.data = torch.tensor([[0, 0, 5, 5, 0.9, 3], [1, 1, 9, 9, 0.8, 4]])
        self.xyxy = self.data[:, :4]


def test_detections_of_other_libraries_are_recognised_by_xyxy() -> None:
    assert [prompt.box for prompt in parse_boxes(Boxes())] == [(0, 0, 5, 5), (1, 1, 9, 9)]


def test_detections_need_as_many_class_names_as_boxes() -> None:
    found = as_supervision()
    found.data["class_name"] = np.array(["cat"])
    with pytest.raises(PromptError, match="2 boxes need as many class names"):
        parse_boxes(found)


def test_the_invalid_one_of_several_objects_is_named_by_its_index() -> None:
    prompts = [Prompt(points=[(1, 1)]), Prompt(box=(700, 0, 800, 9))]
    with pytest.raises(PromptError, match=r"^objects\[1\]: box .* lies entirely outside"):
        pack(prompts, WIDTH, HEIGHT, MASK_SIDE)
    with pytest.raises(PromptError, match=r"^objects\[257\]: box .* lies entirely outside"):
        pack(prompts[1:], WIDTH, HEIGHT, MASK_SIDE, first=257)


def test_more_tokens_than_the_server_accepts_are_rejected() -> None:
    prompt = Prompt(points=[(1, 1)] * 3, box=(0, 0, 5, 5))
    assert pack([prompt], WIDTH, HEIGHT, MASK_SIDE, max_tokens=5).point_labels.shape == (1, 5)
    with pytest.raises(PromptError, match=r"has 5 tokens \(1 per point, 2 per box\), .* at most 4"):
        pack([prompt], WIDTH, HEIGHT, MASK_SIDE, max_tokens=4)
