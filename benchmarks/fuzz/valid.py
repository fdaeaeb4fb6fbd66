"""Valid requests to every model that callers use."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from benchmarks.fuzz.messages import Request
from benchmarks.fuzz.subject import (
    CLICK,
    DECODER,
    ENSEMBLE,
    FILE,
    RLE,
    SIZE,
    Array,
    Subject,
    request,
    strings,
)
from benchmarks.wire import FEATURES

EMBEDDINGS = "sam3_prompt_decoder, embeddings"
FORMS = {  # percentages: requests that encode an image are expensive
    DECODER: 46,
    CLICK: 28,
    EMBEDDINGS: 6,
    ENSEMBLE: 6,
    RLE: 6,
    FILE: 8,
}
KEEPS = {EMBEDDINGS, ENSEMBLE, RLE, FILE}
FRACTIONS = st.floats(0, 1, width=32)


@dataclass(frozen=True)
class ValidRequest:
    """A request that must be answered with masks."""

    request: Request
    images: int
    objects: int

    @property
    def points(self) -> str:
        """The name of the input with the coordinates."""
        return "points" if self.request.model == FILE else "point_coords"

    @property
    def candidates(self) -> int:
        """K"""
        flags = {t.name: t.data[:1] for t in self.request.inputs if t.datatype == "BOOL"}
        one = flags.get("multimask_output") == b"\0" or flags.get("best_only") == b"\1"
        return 1 if one else 3


@st.composite
def valid_requests(draw: st.DrawFn, subject: Subject, form: str | None = None) -> ValidRequest:
    """Draw a request to any model, with few objects of few tokens."""
    if form is None:
        form = draw(st.sampled_from([f for f, often in FORMS.items() for _ in range(often)]))
    images = draw(st.sampled_from([1, 1, 1, 1, 2]))
    objects = draw(st.integers(1, 3))
    arrays = {
        **_image(draw, subject, form, images),
        **_prompts(draw, form, images, objects),
        **_masks(draw, subject, form, images, objects),
        **_flags(draw, form, images),
    }
    model = DECODER if form == EMBEDDINGS else form
    return ValidRequest(request(model, arrays), images, objects)


def _image(draw: st.DrawFn, subject: Subject, form: str, images: int) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    if form in (DECODER, CLICK):
        arrays["image_id"] = strings(subject.image_id, images)
    elif form == EMBEDDINGS:
        arrays |= {n: np.repeat(subject.features[n], images, axis=0) for n in FEATURES}
    elif form == FILE:
        file = draw(st.sampled_from(subject.files))
        arrays["encoded_image"] = strings(file, images)
    else:
        arrays["image"] = np.repeat(subject.image, images, axis=0)
    if form in (CLICK, RLE):
        size = draw(st.sampled_from([SIZE, (1, 1), (640, 480), (7, 900)]))
        arrays["image_size"] = np.full((images, 2), size, np.int32)
    return arrays


def _prompts(draw: st.DrawFn, form: str, images: int, objects: int) -> dict[str, Array]:
    box, tokens = draw(st.booleans()), draw(st.integers(1, 3))
    labels = np.array([draw(st.sampled_from([0, 1])) for _ in range(tokens)])
    coords = np.array([[draw(FRACTIONS), draw(FRACTIONS)] for _ in range(tokens)])
    if box:
        labels = np.concatenate(([2, 3], labels))
        coords = np.concatenate(([[0.1, 0.2], [0.7, 0.9]], coords))
    if draw(st.booleans()):
        labels = np.append(labels, -1)
        coords = np.append(coords, [[draw(st.sampled_from([0, 7, np.nan]))] * 2], axis=0)
    coords = coords.astype(np.float32) * (SIZE if form == FILE else 1)
    name = "points" if form == FILE else "point_coords"
    every = (images, objects)
    return {
        name: np.broadcast_to(coords.astype(np.float32), (*every, *coords.shape)).copy(),
        "point_labels": np.broadcast_to(labels.astype(np.int32), (*every, len(labels))).copy(),
    }


def _masks(
    draw: st.DrawFn, subject: Subject, form: str, images: int, objects: int
) -> dict[str, Array]:
    kind = draw(st.sampled_from(["none"] * 5 + ["no plane", "NaN", "level", "noise"]))
    if form == FILE or kind == "none":
        return {}
    shape = (images, 0 if kind == "no plane" else objects, subject.mask_side, subject.mask_side)
    if kind == "noise":
        noise = np.random.default_rng(draw(st.integers(0, 9))).normal(0, 9, shape)
        return {"mask_input": noise.astype(np.float16)}
    level = np.nan if kind == "NaN" else draw(st.sampled_from([0, -32, 32, 65504]))
    return {"mask_input": np.full(shape, level, np.float16)}


def _flags(draw: st.DrawFn, form: str, images: int) -> dict[str, Array]:
    names = ["multimask_output"]
    names += ["best_only"] if form != FILE else []
    names += ["keep_image"] if form in KEEPS else []
    flags = {name: draw(st.sampled_from([None, False, True])) for name in names}
    return {n: np.full((images, 1), flag) for n, flag in flags.items() if flag is not None}
