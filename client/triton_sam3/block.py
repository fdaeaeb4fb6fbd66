"""Run a step written for Roboflow's workflow block on your own server.

    {"type": "roboflow_core/sam3_interactive@v1",   ┐
     "images": "$inputs.image",                     │
     "points": […] or "$inputs.points",             ├─► segment(image, …) per image ─► predictions
     "boxes": "$steps.detector.predictions",        │
     "threshold": 0.0, "multimask_output": true}    ┘

Only the step is read: the caller supplies the values its selectors stand for.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from .errors import PromptError
from .geometry import ImageLike, load_image
from .parsing import parse_bool, parse_threshold
from .prompts import Prompt, overlaps, to_prompts
from .results import Segmentation, import_supervision

BLOCK_TYPE = "roboflow_core/sam3_interactive@v1"
DEFAULTS: dict[str, Any] = {
    "points": None,
    "boxes": None,
    "threshold": 0.0,
    "multimask_output": True,
}


class Segmenter(Protocol):
    """Anything that segments one image: a `Client`, or an object that stands in for one."""

    def segment(
        self,
        image: ImageLike,
        *,
        prompts: Sequence[Prompt],
        threshold: float = 0.0,
        multimask_output: bool = True,
    ) -> Segmentation:
        """Segment `image`."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class BlockCall:
    """The arguments of `segment` for one image, and its name, its masks' parent id."""

    image: ImageLike
    prompts: tuple[Prompt, ...]
    threshold: float
    multimask_output: bool
    parent_id: str


def run_block(
    segmenter: Segmenter,
    definition: Mapping[str, Any],
    images: ImageLike | Sequence[ImageLike] | None = None,
    inputs: Mapping[str, Any] | None = None,
    *,
    serialize_results: bool = False,
) -> list[dict[str, Any]]:
    """Run one `sam3_interactive@v1` step and return what the block returns.

    definition: the step's JSON. A string such as "$inputs.points" or "$steps.detector.predictions"
        stands for a value in `inputs`.
    images: one image or a list of images; if omitted, the step's own "images" is looked up. Arrays
        are RGB, as everywhere in this package; those in a workflow are BGR.
    inputs: values by selector ("$steps.detector.predictions"), those of the workflow's inputs also
        by name alone ("points"). Boxes are a batch, a list with one value per image (anything
        `parse_boxes` accepts, or None); a single value applies to every image, as points do.
    serialize_results: false returns `supervision.Detections`, true the JSON-ready dict.

    Returns a list of {"predictions": …}, one per image. As in the block, empty masks are left out,
    and boxes outside the image have no mask. It differs from the block in the following:

    - The block turns masks into polygons. This returns one row per prompt with its mask unchanged,
      including holes and separate regions, under the detection id of its prompt.
    - The boxes of masks end one pixel later, as their maxima are exclusive.
    - Input boxes are clipped to the image, and a point outside it is an error. So is a box of four
      zeros, which is that of an empty mask.

    Raises PromptError for a step of another block and for a selector without a value, and
    everything that `segment` raises; TypeError for an `AsyncClient`; ImportError if the Detections
    need supervision and it is not installed.
    """
    if inspect.iscoroutinefunction(segmenter.segment):
        raise TypeError("run_block is synchronous: pass a Client, not an AsyncClient")
    if not serialize_results:
        import_supervision()  # fails before the server does any work
    results = []
    for call in block_calls(definition, images, inputs):
        pixels = load_image(call.image)
        height, width = pixels.shape[:2]
        answer = segmenter.segment(
            pixels,
            prompts=[p for p in call.prompts if p.box is None or overlaps(p.box, width, height)],
            threshold=call.threshold,
            multimask_output=call.multimask_output,
        )
        results.append(block_output(answer, call, serialize_results=serialize_results))
    return results


def block_calls(
    definition: Mapping[str, Any],
    images: ImageLike | Sequence[ImageLike] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> list[BlockCall]:
    """Turn a step and the values of its selectors into one call per image; see `run_block`."""
    _check_type(definition)
    values = inputs or {}
    fields = {
        name: _resolve(definition.get(name, default), name, values)
        for name, default in DEFAULTS.items()
    }
    given: Any = images
    if given is None:
        given = _resolve(definition.get("images"), "images", values)
    is_list = isinstance(given, (list, tuple))
    batch: list[Any] = list(given) if is_list else [given]
    threshold = parse_threshold(fields["threshold"])
    multimask_output = _multimask_output(fields["multimask_output"])
    boxes = _boxes_per_image(fields["boxes"], len(batch), is_list)
    parents = _parent_ids(definition.get("images"), len(batch), is_list)
    points = _as_the_block_reads(fields["points"])
    return [
        BlockCall(image, to_prompts(points, image_boxes), threshold, multimask_output, parent)
        for image, image_boxes, parent in zip(batch, boxes, parents, strict=True)
    ]


def block_output(
    answer: Segmentation, call: BlockCall, *, serialize_results: bool = False
) -> dict[str, Any]:
    """Return one image's answer in the block's form: {"predictions": …}."""
    visible = dataclasses.replace(answer[answer.boxes.any(axis=1)], parent_id=call.parent_id)
    if serialize_results:
        return {"predictions": visible.to_roboflow(rle=True)}  # a polygon holds only one region
    detections = visible.to_supervision()
    # The image is its own parent and root: it was not cropped from another.
    size = detections.data["image_dimensions"]
    for parent in ("parent", "root_parent"):
        detections.data[f"{parent}_id"] = detections.data["parent_id"]
        detections.data[f"{parent}_coordinates"] = np.zeros((len(visible), 2), np.int64)
        detections.data[f"{parent}_dimensions"] = size
    return {"predictions": detections}


def _check_type(definition: Mapping[str, Any]) -> None:
    if "steps" in definition:
        raise PromptError(f"this is a whole workflow: pass only its step of type {BLOCK_TYPE!r}")
    if definition.get("type") != BLOCK_TYPE:
        raise PromptError(
            f"the step's type is {definition.get('type')!r}, but only {BLOCK_TYPE!r} is supported"
        )


def _resolve(value: Any, name: str, inputs: Mapping[str, Any]) -> Any:
    """Return the value a selector stands for; anything that is not a selector is the value."""
    if value is None and name == "images":
        raise PromptError("the step has no 'images', and none were passed: pass images=…")
    if not isinstance(value, str):
        return value
    if not value.startswith("$"):
        raise PromptError(
            f"{name} is {value!r}: a string must be a selector such as '$inputs.{name}'"
        )
    for key in (value, value.removeprefix("$inputs.")):
        if key in inputs:
            return inputs[key]
    raise PromptError(f"{name} is {value!r}, which has no value: pass inputs={{{value!r}: …}}")


def _as_the_block_reads(points: Any) -> Any:
    """The block ignores a point's other keys, and takes anything true as positive."""
    if not isinstance(points, (list, tuple)):
        return points
    return [
        {"x": p["x"], "y": p["y"], "positive": bool(p.get("positive", True))}
        if isinstance(p, Mapping) and p.keys() >= {"x", "y"}
        else p
        for p in points
    ]


def _boxes_per_image(boxes: Any, count: int, is_list: bool) -> list[Any]:
    """Assign boxes to images: a list of detections is a batch even if a single image is not."""
    batched = isinstance(boxes, (list, tuple)) and (is_list or all(map(_is_detections, boxes)))
    if not batched or not boxes:
        return [boxes] * count
    if len(boxes) != count:
        raise PromptError(
            f"got boxes for {len(boxes)} images, but {count} images: pass one value per image, or "
            "a single value that is not a list for all of them"
        )
    return list(boxes)


def _is_detections(boxes: Any) -> bool:
    """Whether this is all the boxes of an image rather than one box."""
    whole_response = isinstance(boxes, Mapping) and "predictions" in boxes
    return boxes is None or hasattr(boxes, "xyxy") or whole_response


def _multimask_output(value: Any) -> bool:
    chosen = DEFAULTS["multimask_output"] if value is None else value
    return parse_bool(chosen, "multimask_output")


def _parent_ids(selector: Any, count: int, is_list: bool) -> list[str]:
    """Names of the images, as a workflow derives them from the name of its input."""
    name = str(selector or "image").rsplit(".", 1)[-1]
    return [f"{name}.[{index}]" for index in range(count)] if is_list else [name]
