"""Checks an export: its masks and embeddings against those of Meta's modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime as ort
import skimage.data
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn.functional import interpolate

from export.architecture import LOGIT_LIMIT, InteractiveModel
from export.encoder import FEATURES
from export.half_range import (
    LARGEST_ACCEPTED,
    fp16_attentions,
    fp16_layers,
    record_largest,
)
from export.repository import ENCODER

Features = tuple[Tensor, Tensor, Tensor]
Candidates = tuple[Tensor, Tensor]
"""K candidates of an object, three, or one with `multimask_output` false: mask logits [K, M, M] and
predicted IoU [K]."""

FEATURE_TOLERANCE = 1e-4
"""Relative error (L2) of an FP32 encoder's outputs; another summation order costs about 1e-6."""
LOGIT_TOLERANCE = 1e-3
"""Relative error (L2) of the mask logits after an FP32 encoder."""
PREDICTION_TOLERANCE = {True: 1e-3, False: 0.02}
"""Error of predicted IoUs after an FP32 encoder (True) and after an FP16 one (False): 30 times what
rounding costs the demo model, since other weights may be more sensitive."""

PHOTOS = ("coffee", "astronaut", "chelsea", "coins")
"""Photos contained in scikit-image's wheel."""


class PhotoError(Exception):
    """A photo used for the check cannot be read; the message says why."""


class Decode(Protocol):
    """Maps coordinates [T, 2], labels [T] and an earlier mask [M, M] to an object's candidates."""

    def __call__(
        self, coords: Tensor, labels: Tensor, mask: Tensor | None, *, multimask: bool
    ) -> Candidates: ...


@dataclass(frozen=True)
class Check:
    """One measured quantity and its limit."""

    name: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def passed(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass(frozen=True)
class Prompt:
    """A prompt of one object in wire format; `refine` decodes twice, feeding back the mask."""

    name: str
    coords: tuple[tuple[float, float], ...]
    labels: tuple[int, ...]
    refine: bool = False


GRID = tuple((x / 6, y / 6) for y in range(1, 6) for x in range(1, 6))
PROMPTS = (
    Prompt("point", ((0.45, 0.55),), (1,)),
    Prompt("points", ((0.45, 0.55), (0.6, 0.4), (0.1, 0.9)), (1, 1, 0)),
    Prompt("many points", GRID, (1, 0) * 12 + (1,)),  # the path for many tokens (mask_decoder.py)
    Prompt("box", ((0.25, 0.2), (0.8, 0.75)), (2, 3)),
    Prompt("box and points", ((0.25, 0.2), (0.8, 0.75), (0.5, 0.5), (0.3, 0.7)), (2, 3, 1, 0)),
    Prompt("refined mask", ((0.45, 0.55),), (1,), refine=True),
)


@dataclass(frozen=True)
class PromptResult:
    """The worst values of one prompt on one photo, with and without `multimask_output`."""

    logit_error: float
    prediction_error: float
    iou: float


@dataclass(frozen=True)
class PhotoResult:
    """One photo through the exported graphs and through Meta's modules."""

    feature_errors: Mapping[str, float]
    """Relative error by output name."""
    prompts: Mapping[str, PromptResult]
    """By prompt name."""
    largest_values: Sequence[float]
    """Largest value of each tensor that is FP16 in the exported graph; empty for an exact check."""


def check_values(
    repository: Path,
    program: ExportedProgram,
    model: InteractiveModel,
    *,
    photos: Mapping[str, NDArray[np.uint8]],
    min_iou: float,
    exact: bool,
    fused: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Check]:
    """Run the exported graphs and Meta's modules on the same photos and prompts.

    Mask IoU is that of the answer: the candidate with the highest predicted IoU, at the image's
    resolution. `exact` also checks the relative errors of an FP32 export, over every candidate;
    otherwise the values of an FP16 export, with `fused` operators or plain ones, must fit its
    range. Each prompt is decoded with and without `multimask_output`, and the worse value counts.
    Without it Meta's model chooses one of two masks, and a rounding error may flip the choice: an
    FP16 export is compared with the nearer of them.

    ONNX Runtime computes most of an FP16 graph in FP32 on a CPU: a GPU rounds somewhat more.
    """
    session = _session(repository)
    decoder = program.module()
    results = []
    for photo, image in photos.items():
        progress(photo)
        results.append(_compare_photo(session, decoder, model, image, exact=exact, fused=fused))
    return _verdicts(results, min_iou=min_iou, exact=exact)


def _compare_photo(
    session: ort.InferenceSession,
    decoder: Callable[..., tuple[Tensor, Tensor]],
    model: InteractiveModel,
    image: NDArray[np.uint8],
    *,
    exact: bool,
    fused: bool,
) -> PhotoResult:
    exported = run_encoder(session, image)
    layers = () if exact else fp16_layers(model, fused=fused)
    attentions = () if exact else fp16_attentions(model, fused=fused)
    with record_largest(layers, attentions) as largest:
        reference = encode_reference(model, image)
    features = zip(FEATURES, exported, reference, strict=True)
    own = partial(run_decoder, decoder, exported)
    metas = partial(decode_reference, model, reference)
    return PhotoResult(
        {name: relative_error(a, b) for name, a, b in features},
        {p.name: _compare_prompt(p, own, metas, model, len(image), exact=exact) for p in PROMPTS},
        largest,
    )


def _compare_prompt(
    prompt: Prompt, own: Decode, metas: Decode, model: InteractiveModel, side: int, *, exact: bool
) -> PromptResult:
    logit_errors: list[float] = []
    prediction_errors, ious = [], []
    for multimask in (True, False):
        ours = decode(prompt, own, multimask=multimask)
        theirs = (
            decode(prompt, metas, multimask=multimask)
            if exact or multimask
            else _nearest(model, prompt, metas, ours, side)
        )
        logit_errors += map(relative_error, ours[0], theirs[0])
        prediction_errors.append(largest_difference(ours[1], theirs[1]))
        ious.append(answer_iou(ours, theirs, side))
    return PromptResult(max(logit_errors), max(prediction_errors), min(ious))


def _verdicts(results: Sequence[PhotoResult], *, min_iou: float, exact: bool) -> list[Check]:
    """The worst value over all photos, against its limit."""
    prompts = {p.name: [result.prompts[p.name] for result in results] for p in PROMPTS}
    if exact:
        checks = [
            Check(
                f"{name}: relative error",
                max(result.feature_errors[name] for result in results),
                FEATURE_TOLERANCE,
            )
            for name in FEATURES
        ] + [
            Check(
                f"{name}: logits' relative error",
                max(prompt.logit_error for prompt in found),
                LOGIT_TOLERANCE,
            )
            for name, found in prompts.items()
        ]
    else:
        largest = max(value for result in results for value in result.largest_values)
        checks = [Check("largest value in FP16", largest, LARGEST_ACCEPTED)]
    checks += [
        Check(
            f"{name}: predicted IoU's error",
            max(prompt.prediction_error for prompt in found),
            PREDICTION_TOLERANCE[exact],
        )
        for name, found in prompts.items()
    ]
    checks += [
        Check(f"{name}: mask IoU", min(prompt.iou for prompt in found), min_iou, at_least=True)
        for name, found in prompts.items()
    ]
    return checks


def _nearest(
    model: InteractiveModel, prompt: Prompt, metas: Decode, ours: Candidates, side: int
) -> Candidates:
    """Which of Meta's two possible answers is nearer to ours: the single mask or, if too many of
    its pixels are near its edge, the best of several (`_dynamic_multimask_via_stability`).
    """
    several = decode(prompt, metas)
    best = several[1].argmax(keepdim=True)
    with _without_fallback(model):
        single = decode(prompt, metas, multimask=False)
    possible = (single, (several[0][best], several[1][best]))
    return max(possible, key=lambda theirs: answer_iou(ours, theirs, side))


@contextmanager
def _without_fallback(model: InteractiveModel) -> Iterator[None]:
    decoder = model.mask_decoder
    configured = decoder.dynamic_multimask_via_stability
    decoder.dynamic_multimask_via_stability = False
    try:
        yield
    finally:
        decoder.dynamic_multimask_via_stability = configured


def _session(repository: Path) -> ort.InferenceSession:
    """The encoder on the CPU; the default is a GPU, if there is one, whose TF32 rounds more."""
    graph = repository / ENCODER / "1" / "model.onnx"
    return ort.InferenceSession(graph, providers=["CPUExecutionProvider"])


def load_photos(names: Iterable[str], side: int) -> dict[str, NDArray[np.uint8]]:
    """Photos by name, as `check_values` takes them; raises `PhotoError`."""
    return {name: load_photo(name, side) for name in names}


def load_photo(name: str, side: int) -> NDArray[np.uint8]:
    """One of scikit-image's photos, RGB, stretched to UINT8 [side, side, 3]."""
    try:
        photo = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
    except OSError as error:
        raise PhotoError(
            f"scikit-image's photo {name}, with which an export is checked, cannot be read: "
            f"{error.strerror or error}; reinstall scikit-image"
        ) from error
    return np.asarray(photo.resize((side, side), Image.Resampling.BILINEAR))


def run_encoder(session: ort.InferenceSession, image: NDArray[np.uint8]) -> Features:
    """Run an exported encoder on one image."""
    first, second, third = session.run(list(FEATURES), {"image": image[None]})
    return torch.from_numpy(first), torch.from_numpy(second), torch.from_numpy(third)


def run_decoder(
    decoder: Callable[..., tuple[Tensor, Tensor]],
    features: Features,
    coords: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    *,
    multimask: bool = True,
) -> Candidates:
    """Run an exported decoder on one object."""
    size = features[1].shape[-1]
    masks, ious = decoder(
        **{name: tensor.float() for name, tensor in zip(FEATURES, features, strict=True)},
        point_coords=torch.cat((coords, torch.zeros(1, 2)))[None],
        point_labels=torch.cat((labels, torch.tensor([-1], dtype=torch.int32)))[None],
        mask_input=torch.empty(0, size, size) if mask is None else mask[None],
        mask_index=torch.arange(0 if mask is None else 1),
    )
    chosen = slice(1, None) if multimask else slice(0, 1)
    return masks[0, chosen], ious[0, chosen]


@torch.inference_mode()
def encode_reference(model: InteractiveModel, image: NDArray[np.uint8]) -> Features:
    """Meta's trunk and neck on one UINT8 image [S, S, 3]."""
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
    return model.encode((pixels - 0.5) / 0.5)


@torch.inference_mode()
def decode_reference(
    model: InteractiveModel,
    features: Features,
    coords: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    *,
    multimask: bool = True,
) -> Candidates:
    """Meta's prompt encoder and mask decoder on one object."""
    sparse, dense = model.prompt_encoder(
        points=(coords[None] * model.architecture.image_size, labels[None]),
        boxes=None,
        masks=None if mask is None else mask[None, None],
    )
    masks, ious, _, _ = model.mask_decoder(
        image_embeddings=features[0],
        image_pe=model.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask,
        repeat_image=False,
        high_res_features=list(features[1:]),
    )
    return masks[0], ious[0]


def decode(prompt: Prompt, decoder: Decode, *, multimask: bool = True) -> Candidates:
    """The candidates for a prompt; a refined one is decoded twice, feeding back the first of
    several masks, which is what the client asks for.
    """
    coords = torch.tensor(prompt.coords)
    labels = torch.tensor(prompt.labels, dtype=torch.int32)
    with torch.inference_mode():
        if not prompt.refine:
            return decoder(coords, labels, None, multimask=multimask)
        first, _ = decoder(coords, labels, None, multimask=True)
        fed_back = first[0].clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
        return decoder(coords, labels, fed_back, multimask=multimask)


def answer_iou(ours: Candidates, theirs: Candidates, side: int) -> float:
    """Mask IoU of the candidate that `theirs` predicts to be best, at side × side pixels.

    Upsampled as a client does it: at M × M, a single pixel that a rounding error moves across zero
    already makes up more than one percent of a small mask.
    """
    best = int(theirs[1].argmax())
    masks = torch.stack((ours[0][best], theirs[0][best]))[None]
    first, second = interpolate(masks, (side, side), mode="bilinear", align_corners=False)[0]
    return mask_iou(first, second)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖ (L2); infinite if a value is not finite."""
    theirs = theirs.double()
    error = float((ours.double() - theirs).norm() / theirs.norm())
    return error if math.isfinite(error) else math.inf


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """max |ours − theirs|; infinite if a value is not finite."""
    difference = float((ours - theirs).abs().max())
    return difference if math.isfinite(difference) else math.inf


def mask_iou(ours: Tensor, theirs: Tensor) -> float:
    """Intersection over union of two masks given as logits; two empty masks agree fully.

    Logits that are not finite agree with nothing.
    """
    if not (ours.isfinite().all() and theirs.isfinite().all()):
        return 0.0
    ours, theirs = ours > 0, theirs > 0
    union = (ours | theirs).sum()
    return float((ours & theirs).sum() / union) if union else 1.0
