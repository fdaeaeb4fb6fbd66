"""What a call returns: the masks of one image, as a frozen value.

Segmentation  ─[i]─► Mask                      one object
              ─[rows]─► Segmentation           a selection; filter(threshold) is one
              ◄─concat─ Segmentation…          of the same image
              ─to_supervision()─► sv.Detections
              ─to_roboflow(), to_coco()─► JSON-ready dicts
              ─polygons(), draw(image), save(path)
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from . import drawing, formats, saving
from .errors import ImageError
from .formats import Polygon
from .geometry import ImageLike, load_image
from .masks import finish_masks, mask_areas, mask_boxes
from .prompts import Prompt

PREDICTION_TYPE = "instance-segmentation"
MAX_REPR_MASKS = 4
"""Most masks that a `repr` lists; an answer may hold hundreds."""


def import_supervision() -> Any:
    """Import the optional package; ImportError says how to install it."""
    try:
        import supervision  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            "Detections need supervision: pip install 'triton-sam3[supervision]'"
        ) from error
    return supervision


def _reaches(scores: NDArray[np.floating[Any]], threshold: float) -> NDArray[np.bool_]:
    """Whether each score is at least `threshold`, compared in double precision as Roboflow does.

    In FP32 a threshold such as 0.9 would be rounded down, and admit scores below it.
    """
    return scores.astype(np.float64) >= threshold


class _ReadOnlyArrays:
    """Every array of an instance is read-only, also of a copied or unpickled one."""

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            if isinstance(value, np.ndarray):
                frozen = value.view()
                frozen.flags.writeable = False
                object.__setattr__(self, name, frozen)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.__post_init__()


@dataclass(frozen=True, eq=False, repr=False)
class Mask(_ReadOnlyArrays):
    """One object's mask; the arrays are read-only.

    mask: bool [H, W] at the size of the caller's image.
    score: predicted IoU, roughly 0 to 1.
    box: float32 [4], x_min, y_min, x_max, y_max of the mask in pixels, the maxima exclusive.
    logits: float16 [M, M]. To refine the mask, pass `Prompt(points=…, mask=answer.logits)` with
        `multimask_output=False`; true would propose three new masks instead of refining this one.
    class_id, class_name, detection_id: from the prompt; prompt_index: its index among the prompts.
    """

    mask: NDArray[np.bool_]
    score: float
    box: NDArray[np.float32]
    logits: NDArray[np.float16]
    class_id: int
    class_name: str
    detection_id: str
    prompt_index: int

    def __repr__(self) -> str:
        height, width = self.mask.shape
        return f"Mask({self.class_name!r}, score {self.score:.2f}, {width}×{height})"

    @property
    def area(self) -> int:
        """Number of pixels in the mask."""
        return int(mask_areas(self.mask[np.newaxis])[0])

    def polygons(self, tolerance: float = 0.0) -> tuple[Polygon, ...]:
        """Outlines of the mask's regions with their holes, the largest first.

        tolerance: pixels by which an outline may move in order to have fewer vertices; see
            `Polygon.simplified`. `Polygon.to_dict` gives plain lists.
        """
        traced = formats.mask_to_polygons(self.mask)
        return tuple(polygon.simplified(tolerance) for polygon in traced) if tolerance else traced

    def png(self) -> bytes:
        """A grey PNG file of the mask, 255 inside and 0 outside."""
        return formats.mask_to_png(self.mask)

    def rle(self) -> dict[str, Any]:
        """COCO's compressed RLE of the mask, ready for JSON."""
        return formats.mask_to_rle(self.mask)


@dataclass(frozen=True, eq=False, repr=False)
class Segmentation(_ReadOnlyArrays):
    """The masks of one image, in the order of the prompts; the arrays are read-only.

    masks: bool [N, H, W] at the size of the caller's image.
    scores: float32 [N], predicted IoU, roughly 0 to 1.
    boxes: float32 [N, 4], x_min, y_min, x_max, y_max of the masks in pixels, maxima exclusive;
        zeros for an empty mask.
    logits: float16 [N, M, M], to refine with.
    class_ids: int64 [N]; class_names, detection_ids: N strings; all three from the prompts.
    prompt_indices: int64 [N], each mask's index among the prompts; a threshold leaves gaps. For
        boxes from a detector, `detections[result.prompt_indices]` are those of the masks.
    image_size: width and height of the caller's image in pixels.
    parent_id: the image's name, for formats that say what the masks belong to.
    """

    masks: NDArray[np.bool_]
    scores: NDArray[np.float32]
    boxes: NDArray[np.float32]
    logits: NDArray[np.float16]
    class_ids: NDArray[np.int64]
    class_names: tuple[str, ...]
    detection_ids: tuple[str, ...]
    prompt_indices: NDArray[np.int64]
    image_size: tuple[int, int]
    parent_id: str = ""

    @classmethod
    def from_logits(
        cls,
        logits: NDArray[np.floating[Any]],
        scores: NDArray[np.floating[Any]],
        prompts: Sequence[Prompt],
        image_size: tuple[int, int],
        *,
        threshold: float = 0.0,
    ) -> Segmentation:
        """Build masks from the server's answer, dropping those with a score below `threshold`.

        logits: [N, M, M], the chosen candidate of each prompt; scores: [N], its predicted IoU.
        A prompt without a detection id gets a new one.
        """
        kept = np.flatnonzero(_reaches(scores, threshold))
        chosen = [prompts[index] for index in kept]
        masks = finish_masks(logits[kept], *image_size)
        return cls(
            masks=masks,
            scores=scores[kept].astype(np.float32),
            boxes=mask_boxes(masks),
            logits=logits[kept].astype(np.float16, copy=False),
            class_ids=np.array([prompt.class_id for prompt in chosen], np.int64),
            class_names=tuple(prompt.class_name for prompt in chosen),
            detection_ids=tuple(prompt.detection_id or str(uuid.uuid4()) for prompt in chosen),
            prompt_indices=kept.astype(np.int64),
            image_size=image_size,
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Segmentation:
        """Read what `save` wrote to an .npz file; ValueError for any other file."""
        return cls(**saving.read_arrays(path))

    @classmethod
    def concat(cls, results: Iterable[Segmentation]) -> Segmentation:
        """Join results about one image, such as one from points and one from boxes.

        The masks stay in order. `prompt_indices` still refer to the prompts of each result's own
        call, and parent_id is the first result's. Raises ValueError if there are no results, or if
        their images or logits differ in size.
        """
        given = tuple(results)
        sizes = {result.image_size for result in given}
        full = [result for result in given if len(result)] or list(given[:1])
        if len(sizes) != 1 or len({result.logits.shape[1:] for result in full}) != 1:
            raise ValueError(
                f"results to concatenate must be about one image, from one model; got {list(given)}"
            )
        columns = (*saving.ARRAYS, *saving.TEXTS)
        joined = {name: [getattr(result, name) for result in full] for name in columns}
        arrays: Any = {name: np.concatenate(joined[name]) for name in saving.ARRAYS}
        texts: Any = {name: tuple(chain(*joined[name])) for name in saving.TEXTS}
        return replace(given[0], **arrays, **texts)

    def __repr__(self) -> str:
        width, height = self.image_size
        listed = [f"{mask.class_name} {mask.score:.2f}" for mask in self[:MAX_REPR_MASKS]]
        more = ", …" if len(self) > MAX_REPR_MASKS else ""
        return f"Segmentation({len(self)} masks, {width}×{height}: {', '.join(listed)}{more})"

    def __len__(self) -> int:
        return len(self.masks)

    def __iter__(self) -> Iterator[Mask]:
        return (self[index] for index in range(len(self)))

    @overload
    def __getitem__(self, key: int | np.integer[Any]) -> Mask: ...
    @overload
    def __getitem__(self, key: slice | Sequence[int] | NDArray[Any]) -> Segmentation: ...
    def __getitem__(
        self, key: int | np.integer[Any] | slice | Sequence[int] | NDArray[Any]
    ) -> Mask | Segmentation:
        """A `Mask` for an integer; a `Segmentation` for a slice, indices or one bool per mask."""
        if isinstance(key, tuple):
            key = list(key)  # NumPy would read one index per axis
        if isinstance(key, (int, np.integer)):
            return Mask(
                self.masks[key],
                float(self.scores[key]),
                self.boxes[key],
                self.logits[key],
                int(self.class_ids[key]),
                self.class_names[key],
                self.detection_ids[key],
                int(self.prompt_indices[key]),
            )
        rows = np.arange(len(self))[key]
        arrays: Any = {name: getattr(self, name)[key] for name in saving.ARRAYS}
        texts: Any = {name: tuple(getattr(self, name)[n] for n in rows) for name in saving.TEXTS}
        return replace(self, **arrays, **texts)

    def filter(self, threshold: float) -> Segmentation:
        """The masks with a score of at least `threshold`."""
        return self[_reaches(self.scores, threshold)]

    @property
    def areas(self) -> NDArray[np.int64]:
        """Number of pixels in each mask, int64 [N]."""
        return mask_areas(self.masks)

    def polygons(self, tolerance: float = 0.0) -> tuple[tuple[Polygon, ...], ...]:
        """The `Mask.polygons` of each mask."""
        return tuple(mask.polygons(tolerance) for mask in self)

    def to_supervision(self) -> Any:
        """Return `supervision.Detections`: xyxy, mask, confidence, class_id, and in data
        class_name, detection_id, parent_id, image_dimensions (height, width), prediction_type.
        `mask` is read-only, as here; the other arrays are copies.

        Raises ImportError if supervision is not installed.
        """
        sv = import_supervision()
        width, height = self.image_size
        return sv.Detections(
            xyxy=self.boxes.copy(),
            mask=self.masks,
            confidence=self.scores.copy(),
            class_id=self.class_ids.copy(),
            data={
                "class_name": np.array(self.class_names, np.str_),
                "detection_id": np.array(self.detection_ids, np.str_),
                "parent_id": np.array([self.parent_id] * len(self), np.str_),
                "image_dimensions": np.full((len(self), 2), (height, width)),
                "prediction_type": np.array([PREDICTION_TYPE] * len(self), np.str_),
            },
        )

    def to_roboflow(self, *, rle: bool = False) -> dict[str, Any]:
        """Return Roboflow's instance-segmentation JSON: {"image": …, "predictions": […]}.

        x and y are the centre of the mask's box. `points` holds only one ring, so it outlines
        the largest region without its holes; `rle` adds the whole mask as `rle_mask`, which
        `supervision.Detections.from_inference` prefers. Empty masks have no outline and are
        left out, as in Roboflow's own serialiser.
        """
        width, height = self.image_size
        return {
            "image": {"width": width, "height": height},
            "predictions": [self._prediction(mask, rle) for mask in self if mask.box.any()],
        }

    def to_coco(self, image_id: int | str = 0) -> list[dict[str, Any]]:
        """Return COCO annotations: RLE segmentation, bbox (x, y, width, height), area, score.

        category_id is the class id. Give each annotation an "id" before adding it to a data set.
        Empty masks are left out: programs that train on COCO or show it expect an area.
        """
        return [
            {
                "image_id": image_id,
                "category_id": mask.class_id,
                "segmentation": mask.rle(),
                "bbox": [float(side) for side in (*mask.box[:2], *(mask.box[2:] - mask.box[:2]))],
                "area": mask.area,
                "iscrowd": 0,
                "score": mask.score,
            }
            for mask in self
            if mask.box.any()
        ]

    def draw(
        self, image: ImageLike, *, prompts: Iterable[Prompt] = (), opacity: float = 0.5
    ) -> NDArray[np.uint8]:
        """Return `image` as RGB uint8 [H, W, 3] with the masks tinted and outlined on it.

        opacity: 0 to 1, how much of the image under a mask is covered. `prompts` are drawn on top:
        positive points green, negative red, boxes yellow. Raises ImageError if the image does
        not have the size of the one that was segmented.
        """
        pixels = load_image(image)
        if pixels.shape[1::-1] != self.image_size:
            raise ImageError(
                f"the image is {pixels.shape[1]}×{pixels.shape[0]}, but the masks belong to one of "
                f"{self.image_size[0]}×{self.image_size[1]}: draw on the image that was segmented"
            )
        return drawing.overlay(pixels, self.masks, prompts, opacity)

    def save(
        self,
        path: str | os.PathLike[str],
        image: ImageLike | None = None,
        *,
        prompts: Iterable[Prompt] = (),
    ) -> None:
        """Write to a file, which is replaced only once it is complete; its suffix determines the
        format.

        .json  `to_roboflow(rle=True)`
        .npz   all arrays, unchanged; `Segmentation.load` reads it back
        .png   with `image`, the overlay of `draw`, `prompts` included; without, an index mask:
               0 background, i + 1 mask i, the best score on top (16-bit beyond 255 masks)
        .jpg   the overlay; needs `image`
        """
        suffix = saving.file_kind(Path(path), with_image=image is not None)
        with saving.replacing(Path(path)) as target:
            if suffix == ".json":
                target.write_text(json.dumps(self.to_roboflow(rle=True)), encoding="utf-8")
            elif suffix == ".npz":
                target.write_bytes(saving.arrays(self))
            elif image is None:
                Image.fromarray(formats.index_mask(self.masks, self.scores)).save(target)
            else:
                Image.fromarray(self.draw(image, prompts=prompts)).save(target)

    def _prediction(self, mask: Mask, rle: bool) -> dict[str, Any]:
        x_min, y_min, x_max, y_max = (float(side) for side in mask.box)
        prediction = {
            "x": (x_min + x_max) / 2,
            "y": (y_min + y_max) / 2,
            "width": x_max - x_min,
            "height": y_max - y_min,
            "points": formats.to_roboflow_ring(mask.polygons()),
            "confidence": mask.score,
            "class": mask.class_name,
            "class_id": mask.class_id,
            "detection_id": mask.detection_id,
            "parent_id": self.parent_id,
        }
        return {**prediction, "rle_mask": mask.rle()} if rle else prediction
