"""A segmentation as a value, and read by the libraries its formats are for."""

import copy
import dataclasses
import io
import json
import pickle
import resource
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import supervision as sv
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from triton_sam3.errors import ImageError, PromptError
from triton_sam3.prompts import Prompt, to_prompts
from triton_sam3.results import Mask, Segmentation

WIDTH, HEIGHT, SIDE = 320, 200, 72


def ring(x: float, y: float, radius: float, hole: float = 0) -> NDArray[np.float32]:
    """Logits of a disc on the mask grid, with a hole of its own centre if asked."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    distance = np.hypot(columns - x, rows - y)
    logits = radius - distance
    if hole:
        logits = np.minimum(logits, distance - hole)
    return np.asarray(logits, np.float32)


@pytest.fixture
def segmentation() -> Segmentation:
    """Two detections, one of them a ring, and an object of points."""
    boxes = [
        {"x": 80, "y": 60, "width": 90, "height": 80, "class": "cup", "class_id": 4},
        {"x": 200, "y": 90, "width": 50, "height": 50, "class": "ring", "class_id": 7}
        | {"detection_id": "given"},
    ]
    logits = np.stack([ring(18, 20, 9), ring(45, 34, 15, 7), ring(60, 60, 5)])
    found = Segmentation.from_logits(
        logits,
        np.array([0.9, 0.4, 0.75], np.float32),
        to_prompts([(260, 160)], boxes),
        (WIDTH, HEIGHT),
    )
    return dataclasses.replace(found, parent_id="photo")


@pytest.fixture
def picture() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


def test_shapes_types_and_order(segmentation: Segmentation) -> None:
    assert len(segmentation) == 3
    assert segmentation.masks.shape == (3, HEIGHT, WIDTH)
    assert segmentation.masks.dtype == np.bool_
    assert segmentation.scores.dtype == np.float32
    assert segmentation.boxes.dtype == np.float32
    assert segmentation.logits.dtype == np.float16
    assert segmentation.logits.shape == (3, SIDE, SIDE)
    assert segmentation.class_ids.tolist() == [4, 7, -1]
    assert segmentation.class_names == ("cup", "ring", "foreground")
    assert segmentation.image_size == (WIDTH, HEIGHT)
    assert segmentation.areas.tolist() == segmentation.masks.sum(axis=(1, 2)).tolist()


def test_detection_ids_come_from_the_prompts_or_are_new(segmentation: Segmentation) -> None:
    made, given, other = segmentation.detection_ids
    assert given == "given"
    assert uuid.UUID(made) != uuid.UUID(other)


def test_results_are_read_only(segmentation: Segmentation) -> None:
    for name in ("masks", "scores", "boxes", "logits", "class_ids"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(segmentation, name)[:] = 0
    with pytest.raises(ValueError, match="read-only"):
        segmentation[0].mask[:] = False
    with pytest.raises(dataclasses.FrozenInstanceError):
        segmentation.parent_id = ""  # type: ignore[misc]


def test_a_threshold_is_compared_in_double_precision(segmentation: Segmentation) -> None:
    """As Roboflow's is: the score nearest to 0.9 in FP32 lies below it."""
    assert segmentation.scores[0] == np.float32(0.9)
    assert segmentation.filter(0.9).class_names == ()
    assert segmentation.filter(0.8999999).class_names == ("cup",)


def test_a_threshold_and_a_filter_drop_the_same_masks(segmentation: Segmentation) -> None:
    assert segmentation.filter(0.0).scores.tolist() == segmentation.scores.tolist()
    kept = segmentation.filter(0.75)
    assert kept.class_names == ("cup", "foreground")
    np.testing.assert_array_equal(kept.masks, segmentation.masks[[0, 2]])
    assert kept.detection_ids == (segmentation.detection_ids[0], segmentation.detection_ids[2])
    early = Segmentation.from_logits(
        segmentation.logits,
        segmentation.scores,
        [Prompt(points=[(1, 1)], class_name=name) for name in "abc"],
        (WIDTH, HEIGHT),
        threshold=0.75,
    )
    assert early.class_names == ("a", "c")
    assert early.prompt_indices.tolist() == kept.prompt_indices.tolist() == [0, 2]
    assert (early[1:].prompt_indices.tolist(), early[1].prompt_index) == ([2], 2)
    np.testing.assert_array_equal(early.masks, kept.masks)


def test_items_and_selections(segmentation: Segmentation) -> None:
    masks = list(segmentation)
    assert [type(mask) for mask in masks] == [Mask] * 3
    assert masks[1].class_name == "ring"
    assert masks[1].detection_id == "given"
    assert masks[1].score == pytest.approx(0.4)
    assert masks[1].area == segmentation.areas[1]
    assert masks[1].box.tolist() == segmentation.boxes[1].tolist()
    assert segmentation[-1].class_id == -1
    assert segmentation[np.int64(2)].class_id == -1
    assert segmentation[1:].class_names == ("ring", "foreground")
    assert segmentation[[2, 0]].class_ids.tolist() == [-1, 4]
    assert segmentation[segmentation.areas > 10**9].detection_ids == ()
    with pytest.raises(IndexError):
        segmentation[3]


def test_reprs_are_short(segmentation: Segmentation) -> None:
    assert repr(segmentation) == (
        "Segmentation(3 masks, 320×200: cup 0.90, ring 0.40, foreground 0.75)"
    )
    assert repr(segmentation[0]) == "Mask('cup', score 0.90, 320×200)"
    assert repr(segmentation[[0] * 9]).endswith("cup 0.90, …)")


def test_logits_can_be_used_to_refine(segmentation: Segmentation) -> None:
    prompt = Prompt(points=[(80, 60)], mask=segmentation[0].logits)
    assert prompt.mask is not None
    np.testing.assert_array_equal(prompt.mask, segmentation.logits[0])


@pytest.mark.semantic("results", "`to_supervision`", "the format's own reader")
def test_results_convert_to_supervision(segmentation: Segmentation) -> None:
    detections = segmentation.to_supervision()
    assert isinstance(detections, sv.Detections)
    np.testing.assert_array_equal(detections.mask, segmentation.masks)
    np.testing.assert_array_equal(detections.xyxy, segmentation.boxes)
    np.testing.assert_array_equal(detections.confidence, segmentation.scores)
    np.testing.assert_array_equal(detections.class_id, [4, 7, -1])
    assert detections["class_name"].tolist() == ["cup", "ring", "foreground"]
    assert tuple(detections["detection_id"]) == segmentation.detection_ids
    assert detections["parent_id"].tolist() == ["photo"] * 3
    assert detections["image_dimensions"].tolist() == [[HEIGHT, WIDTH]] * 3
    # Supervision's own boxes name the last pixel, ours end behind it.
    last_pixels = detections.xyxy - np.array([0, 0, 1, 1])
    np.testing.assert_array_equal(sv.mask_to_xyxy(detections.mask), last_pixels)
    assert detections[detections.confidence > 0.5]["class_name"].tolist() == ["cup", "foreground"]
    assert len(sv.Detections.merge([detections, detections])) == 6


def test_supervision_round_trip(segmentation: Segmentation) -> None:
    prompts = to_prompts(boxes=segmentation.to_supervision())
    assert [list(prompt.box or ()) for prompt in prompts] == segmentation.boxes.tolist()
    assert tuple(prompt.class_name for prompt in prompts) == segmentation.class_names
    assert [prompt.class_id for prompt in prompts] == segmentation.class_ids.tolist()
    assert tuple(prompt.detection_id for prompt in prompts) == segmentation.detection_ids


def test_changing_the_detections_does_not_change_the_result(segmentation: Segmentation) -> None:
    detections = segmentation.to_supervision()
    detections.xyxy[:] = 0
    detections.class_id[:] = 1
    detections.confidence[:] = 1
    assert segmentation.boxes.any()


def test_a_missing_supervision_is_an_error_that_says_how_to_install_it(
    segmentation: Segmentation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match=r"pip install 'triton-sam3\[supervision\]'"):
        segmentation.to_supervision()
    assert segmentation.to_roboflow()


def test_roboflow_fields(segmentation: Segmentation) -> None:
    response = json.loads(json.dumps(segmentation.to_roboflow()))
    assert response["image"] == {"width": WIDTH, "height": HEIGHT}
    first = response["predictions"][0]
    x_min, y_min, x_max, y_max = segmentation.boxes[0].tolist()
    assert first | {"points": None} == {
        "x": (x_min + x_max) / 2,
        "y": (y_min + y_max) / 2,
        "width": x_max - x_min,
        "height": y_max - y_min,
        "points": None,
        "confidence": pytest.approx(0.9),
        "class": "cup",
        "class_id": 4,
        "detection_id": segmentation.detection_ids[0],
        "parent_id": "photo",
    }
    drawn = np.zeros((HEIGHT, WIDTH), np.uint8)
    vertices = [(point["x"], point["y"]) for point in first["points"]]
    cv2.fillPoly(drawn, [np.array(vertices, np.int32)], 1)
    np.testing.assert_array_equal(drawn.astype(np.bool_), segmentation.masks[0])


@pytest.mark.semantic("results", "`to_roboflow`", "the format's own reader")
def test_roboflow_read_by_supervision(segmentation: Segmentation) -> None:
    outlined = sv.Detections.from_inference(segmentation.to_roboflow())
    np.testing.assert_array_equal(outlined.mask[[0, 2]], segmentation.masks[[0, 2]])
    assert outlined.mask[1].sum() > segmentation.areas[1]  # one ring cannot say there is a hole
    exact = sv.Detections.from_inference(segmentation.to_roboflow(rle=True))
    np.testing.assert_array_equal(exact.mask, segmentation.masks)
    np.testing.assert_array_equal(exact.xyxy, segmentation.boxes)
    np.testing.assert_array_equal(exact.class_id, segmentation.class_ids)
    assert tuple(exact["class_name"]) == segmentation.class_names
    np.testing.assert_allclose(exact.confidence, segmentation.scores)


@pytest.mark.semantic("results", "`to_coco`", "the format's own reader")
def test_coco_read_by_pycocotools(segmentation: Segmentation, tmp_path: Path) -> None:
    annotations = segmentation.to_coco(image_id=17)
    for annotation, mask, box in zip(
        annotations, segmentation.masks, segmentation.boxes, strict=True
    ):
        np.testing.assert_array_equal(coco_mask.decode(annotation["segmentation"]), mask)
        assert annotation["area"] == coco_mask.area(annotation["segmentation"]) == mask.sum()
        np.testing.assert_array_equal(
            annotation["bbox"], coco_mask.toBbox(annotation["segmentation"])
        )
        assert annotation["bbox"][:2] == box[:2].tolist()
    dataset = {
        "images": [{"id": 17, "width": WIDTH, "height": HEIGHT}],
        "categories": [{"id": 4, "name": "cup"}, {"id": 7, "name": "ring"}, {"id": -1, "name": ""}],
        "annotations": [{"id": i, **a} for i, a in enumerate(annotations, 1)],
    }
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(dataset))
    coco = COCO(path)
    (ring_annotation,) = coco.loadAnns(coco.getAnnIds(imgIds=17, catIds=7))
    np.testing.assert_array_equal(coco.annToMask(ring_annotation), segmentation.masks[1])


def test_polygons(segmentation: Segmentation) -> None:
    regions = segmentation.polygons()
    assert [len(polygons) for polygons in regions] == [1, 1, 1]
    assert [len(polygons[0].holes) for polygons in regions] == [0, 1, 0]


def test_outlines_with_fewer_vertices(segmentation: Segmentation) -> None:
    for plain, fewer in zip(segmentation.polygons(), segmentation.polygons(2.0), strict=True):
        assert 3 <= len(fewer[0].outer) < len(plain[0].outer)
    assert Image.open(io.BytesIO(segmentation[1].png())).size == (WIDTH, HEIGHT)


def test_concatenating_the_parts_gives_the_whole(segmentation: Segmentation) -> None:
    none = Segmentation.from_logits(
        np.zeros((0, 0, 0), np.float16), np.zeros(0, np.float32), (), (WIDTH, HEIGHT)
    )
    parts = [segmentation[[]], segmentation[:1], none, segmentation[1:]]
    whole = Segmentation.concat(part for part in parts)
    for field in dataclasses.fields(Segmentation):
        np.testing.assert_array_equal(getattr(whole, field.name), getattr(segmentation, field.name))
    assert whole.class_names == segmentation.class_names
    assert not whole.masks.flags.writeable
    assert len(Segmentation.concat([none, none])) == 0


def test_results_about_different_images_are_not_concatenated(segmentation: Segmentation) -> None:
    other = dataclasses.replace(segmentation, image_size=(HEIGHT, WIDTH))
    finer = dataclasses.replace(segmentation, logits=np.zeros((3, 9, 9), np.float16))
    for results in ([], [segmentation, other], [segmentation, finer]):
        with pytest.raises(ValueError, match="must be about one image, from one model; got"):
            Segmentation.concat(results)


def test_draw_accepts_any_image(
    segmentation: Segmentation, picture: NDArray[np.uint8], tmp_path: Path
) -> None:
    path = tmp_path / "photo.png"
    Image.fromarray(picture).save(path)
    drawn = segmentation.draw(picture)
    assert drawn.shape == picture.shape
    assert (drawn[segmentation.masks[0]] != picture[segmentation.masks[0]]).any(axis=1).mean() > 0.9
    np.testing.assert_array_equal(segmentation.draw(path), drawn)
    with pytest.raises(ImageError, match=r"the image is 200×320, .* one of 320×200: draw on the"):
        segmentation.draw(np.ascontiguousarray(picture.swapaxes(0, 1)))


def test_save_and_load_arrays(segmentation: Segmentation, tmp_path: Path) -> None:
    segmentation.save(tmp_path / "answer.npz")
    loaded = Segmentation.load(tmp_path / "answer.npz")
    for field in dataclasses.fields(Segmentation):
        before, after = getattr(segmentation, field.name), getattr(loaded, field.name)
        if isinstance(before, np.ndarray):
            assert before.dtype == after.dtype
            np.testing.assert_array_equal(before, after)
        else:
            assert before == after


@pytest.mark.parametrize("name", ["answer.json", "answer.png", "other.npz", "one.npy", "empty"])
def test_only_files_from_save_are_loaded(
    segmentation: Segmentation, tmp_path: Path, name: str
) -> None:
    segmentation.save(tmp_path / "answer.json")
    segmentation.save(tmp_path / "answer.png")
    np.savez(tmp_path / "other.npz", masks=segmentation.masks)
    np.save(tmp_path / "one.npy", segmentation.masks)
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match=rf"{name}' cannot be loaded: pass an \.npz file"):
        Segmentation.load(tmp_path / name)


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))]
)
def test_a_copied_or_unpickled_result_is_read_only_too(
    segmentation: Segmentation, again: Callable[[Any], Any]
) -> None:
    for value in (segmentation, segmentation[0]):
        twin = again(value)
        arrays = [array for array in vars(twin).values() if isinstance(array, np.ndarray)]
        assert arrays
        assert not any(array.flags.writeable for array in arrays)
        np.testing.assert_array_equal(twin.logits, value.logits)


@pytest.mark.parametrize("name", ["answer.json", "answer.npz", "answer.png", "overlay.png"])
def test_a_full_disk_leaves_the_file_as_it_was(
    segmentation: Segmentation, picture: NDArray[np.uint8], tmp_path: Path, name: str
) -> None:
    image = picture if name.startswith("overlay") else None
    segmentation.save(tmp_path / name, image)
    before = (tmp_path / name).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            segmentation.save(tmp_path / name, image)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / name).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_link_is_followed(segmentation: Segmentation, tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(tmp_path / "file.json")
    segmentation.save(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "file.json").read_text())


def test_save_json(segmentation: Segmentation, tmp_path: Path) -> None:
    segmentation.save(str(tmp_path / "answer.JSON"))
    saved = json.loads((tmp_path / "answer.JSON").read_text())
    assert saved == segmentation.to_roboflow(rle=True)


def test_save_pictures(
    segmentation: Segmentation, picture: NDArray[np.uint8], tmp_path: Path
) -> None:
    segmentation.save(tmp_path / "overlay.png", picture)
    np.testing.assert_array_equal(
        np.asarray(Image.open(tmp_path / "overlay.png")), segmentation.draw(picture)
    )
    segmentation.save(tmp_path / "prompts.png", picture, prompts=to_prompts([(260, 160)]))
    drawn = np.asarray(Image.open(tmp_path / "prompts.png"))
    np.testing.assert_array_equal(
        drawn, segmentation.draw(picture, prompts=to_prompts([(260, 160)]))
    )
    assert (drawn != segmentation.draw(picture)).any()
    segmentation.save(tmp_path / "overlay.jpg", picture)
    assert Image.open(tmp_path / "overlay.jpg").size == (WIDTH, HEIGHT)
    segmentation.save(tmp_path / "index.png")
    indices = np.asarray(Image.open(tmp_path / "index.png"))
    for number, mask in enumerate(segmentation.masks, 1):
        np.testing.assert_array_equal(indices == number, mask)


@pytest.mark.parametrize("name", ["answer.txt", "answer", "answer.jpg"])
def test_save_to_an_unknown_suffix(segmentation: Segmentation, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"cannot save to '{name}': the suffix must be .json"):
        segmentation.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_result_without_masks(picture: NDArray[np.uint8], tmp_path: Path) -> None:
    empty = Segmentation.from_logits(
        np.zeros((0, SIDE, SIDE), np.float16), np.zeros(0, np.float32), (), (WIDTH, HEIGHT)
    )
    assert len(empty) == 0
    assert list(empty) == []
    assert empty.to_supervision().is_empty()
    assert empty.to_coco() == []
    assert empty.to_roboflow() == {"image": {"width": WIDTH, "height": HEIGHT}, "predictions": []}
    assert empty.polygons() == ()
    np.testing.assert_array_equal(empty.draw(picture), picture)
    for name in ("empty.npz", "empty.json", "empty.png"):
        empty.save(tmp_path / name)
    assert Segmentation.load(tmp_path / "empty.npz").masks.shape == (0, HEIGHT, WIDTH)


def test_an_empty_mask_has_no_outline(picture: NDArray[np.uint8]) -> None:
    logits = np.stack([np.full((SIDE, SIDE), -5, np.float32), ring(30, 30, 9)])
    answer = Segmentation.from_logits(
        logits, np.ones(2), to_prompts(boxes=[[1, 1, 9, 9], [2, 2, 99, 99]]), (WIDTH, HEIGHT)
    )
    assert len(answer) == 2
    assert answer.areas[0] == 0
    assert answer[0].polygons() == ()
    assert [p["detection_id"] for p in answer.to_roboflow()["predictions"]] == [
        answer.detection_ids[1]
    ]
    assert [annotation["area"] for annotation in answer.to_coco()] == [answer.areas[1]]
    with pytest.raises(PromptError, match=r"^boxes\[0\]: box .* is the box of an empty mask"):
        to_prompts(boxes=answer.boxes)
    assert len(to_prompts(boxes=answer[answer.areas > 0].to_supervision())) == 1
    assert len(answer.to_supervision()) == 2
    answer.draw(picture)


def test_a_tuple_of_indices_is_a_selection(segmentation: Segmentation) -> None:
    assert segmentation[(1, 0)].class_names == segmentation[[1, 0]].class_names
    assert len(segmentation[()]) == 0


def test_arrays_are_saved_under_the_exact_name(segmentation: Segmentation, tmp_path: Path) -> None:
    segmentation.save(tmp_path / "x.NPZ")
    assert [path.name for path in tmp_path.iterdir()] == ["x.NPZ"]
    assert len(Segmentation.load(tmp_path / "x.NPZ")) == len(segmentation)


def test_a_damaged_file_is_a_value_error(segmentation: Segmentation, tmp_path: Path) -> None:
    path = tmp_path / "answer.npz"
    segmentation.save(path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for at in rng.integers(0, len(whole), 300):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            Segmentation.load(path)
        except ValueError:
            refused += 1
    assert refused > 100
