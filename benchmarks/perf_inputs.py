"""Input files for perf_analyzer: real photos, prompts of every kind, ids of kept images.

    python -m benchmarks.perf_inputs grpc://127.0.0.1:8001 build/perf

    encoder.json             photos                                     sam3_image_encoder
    ensemble.json            photos with prompts: every request cold    sam3_interactive
    ensemble-all-inputs.json the same with every optional input         sam3_interactive
    decoder-warm.json        ids of kept images with prompts            sam3_prompt_decoder
    decoder-embeddings.json  embeddings with prompts                    sam3_prompt_decoder
    decoder-mixed.json       alternately the previous two               sam3_prompt_decoder

With shared memory, perf_analyzer does not support omitting a model's optional inputs. The ensemble
can be given all of its inputs; the decoder cannot: it accepts an id or embeddings, not both.

Ids are issued by a running server and cannot be made up, so this keeps the photos on the given
server and writes their ids to the files. They are valid until the server evicts the images (a
restart, or `kept_images_idle_seconds` without a click): regenerate the files before a run.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import skimage.data
import typer
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.wire import Wire
from export.check import PHOTOS
from triton_sam3 import Prompt
from triton_sam3.geometry import load_image, resize
from triton_sam3.prompts import PackedPrompts, pack

Tensors = Mapping[str, NDArray[Any]]
"""One request's inputs by name, without the batch axis."""

PROMPTS: tuple[tuple[Prompt, ...], ...] = (
    (Prompt(points=[(45, 55)]),),
    (Prompt(box=(25, 20, 80, 75)),),
    (Prompt(points=[(45, 55), (60, 40), (10, 90, False)]),),
    (Prompt(points=[(50, 50, True)], box=(25, 20, 80, 75)), Prompt(points=[(20, 30)])),
)
"""The prompts of each request, in hundredths of the picture; the last has two objects."""
HUNDRED = 100
ENCODER, ENSEMBLE, ALL_INPUTS, WARM, EMBEDDINGS, MIXED = (
    "encoder.json",
    "ensemble.json",
    "ensemble-all-inputs.json",
    "decoder-warm.json",
    "decoder-embeddings.json",
    "decoder-mixed.json",
)


def encoder(images: Sequence[NDArray[np.uint8]]) -> list[Tensors]:
    """A request for each image [S, S, 3]."""
    return [{"image": image} for image in images]


def with_prompts(subjects: Sequence[Tensors], mask_side: int) -> list[Tensors]:
    """A request for every pair of subject (an image, its id, or its embeddings) and prompts."""
    return [
        {**subject, **_inputs(pack(prompts, HUNDRED, HUNDRED, mask_side))}
        for subject in subjects
        for prompts in PROMPTS
    ]


def with_all_inputs(request: Tensors, mask_side: int) -> Tensors:
    """The same request with every optional input of the ensemble, each at its default."""
    objects = len(request["point_labels"])
    return {
        # A plane of NaN means that the object has no mask.
        "mask_input": np.full((objects, mask_side, mask_side), np.nan, np.float16),
        "multimask_output": np.ones(1, np.bool_),
        "keep_image": np.zeros(1, np.bool_),
        **request,
    }


def in_turns(first: Sequence[Tensors], second: Sequence[Tensors]) -> list[Tensors]:
    """Alternate between two sequences until the shorter one ends."""
    return [request for pair in zip(first, second, strict=False) for request in pair]


def _inputs(packed: PackedPrompts) -> Tensors:
    return {
        "point_coords": packed.point_coords,
        "point_labels": packed.point_labels,
        "best_only": np.ones(1, np.bool_),
    }


def document(requests: Sequence[Tensors]) -> str:
    """perf_analyzer's JSON for a sequence of requests."""
    data = [{name: _value(tensor) for name, tensor in request.items()} for request in requests]
    return json.dumps({"data": data})


def _value(tensor: NDArray[Any]) -> dict[str, Any]:
    if tensor.dtype == np.object_:
        return {"content": [item.decode() for item in tensor.flat], "shape": list(tensor.shape)}
    raw = base64.b64encode(np.ascontiguousarray(tensor).data).decode()
    return {"b64": raw, "shape": list(tensor.shape)}


def write(url: str, folder: Path) -> list[Path]:
    """Write all files for the server at `url` and return their paths."""
    wire = Wire(url)
    images = [resize(load_image(getattr(skimage.data, name)()), wire.side) for name in PHOTOS]
    ids = [{"image_id": wire.keep(image)[0]} for image in images]
    embeddings = {name: array[0] for name, array in wire.encode(images[0][None]).items()}
    mask_side = embeddings["high_res_feats_0"].shape[-1]
    wire.close()
    cold = with_prompts(encoder(images), mask_side)
    warm = with_prompts(ids, mask_side)
    stateless = with_prompts([embeddings], mask_side)
    requests = {
        ENCODER: encoder(images),
        ENSEMBLE: cold,
        ALL_INPUTS: [with_all_inputs(request, mask_side) for request in cold],
        WARM: warm,
        EMBEDDINGS: stateless,
        MIXED: in_turns(warm, stateless),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in requests.items():
        (folder / name).write_text(document(tensors))
    return [folder / name for name in requests]


def main(
    url: Annotated[str, typer.Argument(help="The running server: grpc://host:port.")],
    folder: Annotated[Path, typer.Argument(help="Where to write the files.")] = Path("build/perf"),
) -> None:
    """Write perf_analyzer's input files for a running server."""
    console = Console(highlight=False, soft_wrap=True)
    for path in write(url, folder):
        console.print(f"{path}  {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    typer.run(main)
