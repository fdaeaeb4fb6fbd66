"""The material of valid requests: a picture of one known object, encoded by the server."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from benchmarks.fuzz.exchange import Grpc
from benchmarks.fuzz.messages import Request, Tensor, grpc_octets
from benchmarks.wire import FEATURES
from triton_sam3 import contract

ENCODER, DECODER, ENSEMBLE = contract.ENCODER, contract.DECODER, contract.INTERACTIVE
RLE, FILE, CLICK = "sam3_interactive_rle", "sam3_interactive_file", "sam3_click_rle"
SIZE = (96, 64)
"""Width and height of the picture, in pixels."""
DISC = (30, 16, 66, 52)
"""The object's bounding box in the picture."""

Array = NDArray[Any]


@dataclass(frozen=True)
class Subject:
    """One picture in every form that a request can refer to."""

    image: NDArray[np.uint8]
    """[1, S, S, 3]"""
    features: Mapping[str, Array]
    image_id: bytes
    files: tuple[bytes, ...]
    """JPEG, PNG, WebP"""

    @property
    def mask_side(self) -> int:
        """M"""
        return int(self.features["high_res_feats_0"].shape[-1])


def picture() -> Image.Image:
    """A bright disc on a dark ground."""
    drawn = Image.new("RGB", SIZE, (30, 50, 40))
    ImageDraw.Draw(drawn).ellipse(DISC, fill=(220, 180, 60))
    return drawn


def disc() -> NDArray[np.bool_]:
    """The pixels of the disc, [H, W]."""
    drawn = Image.new("1", SIZE)
    ImageDraw.Draw(drawn).ellipse(DISC, fill=1)
    return np.asarray(drawn)


def saved(image: Image.Image, form: str) -> bytes:
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def middle() -> dict[str, Array]:
    """One click on the middle of the disc, in fractions."""
    x, y = (DISC[0] + DISC[2]) / 2 / SIZE[0], (DISC[1] + DISC[3]) / 2 / SIZE[1]
    return {
        "point_coords": np.full((1, 1, 1, 2), (x, y), np.float32),
        "point_labels": np.ones((1, 1, 1), np.int32),
    }


def strings(value: bytes, images: int = 1) -> Array:
    """The same octets for every image, [B, 1]; `numpy.full` would drop trailing zeros."""
    return np.array([[value]] * images, np.object_)


def request(model: str, arrays: Mapping[str, Array]) -> Request:
    return Request(model, tuple(Tensor.from_array(name, array) for name, array in arrays.items()))


def prepare(grpc: Grpc, side: int) -> Subject:
    """Have the server encode and keep the picture."""
    image = np.asarray(picture().resize((side, side), Image.Resampling.BILINEAR))[None]
    encoded = ask(grpc, request(ENCODER, {"image": image}))
    arrays = {"image": image, "keep_image": np.array([[True]]), **middle()}
    kept = ask(grpc, request(ENSEMBLE, arrays))
    files = tuple(saved(picture(), form) for form in ("JPEG", "PNG", "WEBP"))
    features = {name: encoded.as_numpy(name) for name in FEATURES}
    return Subject(image, features, kept.as_numpy("image_id").item(), files)


def ask(grpc: Grpc, valid: Request) -> Any:
    """Return tritonclient's InferResult for a request that must succeed, or raise RuntimeError."""
    answer = grpc.send(grpc_octets(valid))
    if answer.result is None:
        raise RuntimeError(f"{valid.model} rejected a valid request: {answer.code} {answer.text}")
    return answer.result
