"""SAM 3 at its published size: exported, served, and compared with Meta's predictor.

The weights are random, from a seed, in the official layout. Rounding errors show with random
weights as well as with trained ones, and their logits are close to zero, which makes mask IoU a
stricter test.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
from numpy.typing import NDArray

from benchmarks.random_weights import save_random_checkpoint
from benchmarks.reference import meta_predictor
from export.architecture import Architecture
from export.check import load_photo, mask_iou, relative_error
from export.encoder import FEATURES
from server import TritonServer
from tests.meta import predict
from triton_sam3 import Client, Prompt

pytestmark = [pytest.mark.full_size, pytest.mark.timeout(2400)]

SIDE = Architecture().image_size
FEATURE_TOLERANCE = 1e-4
LOGIT_TOLERANCE = 1e-3
MIN_IOU = 0.999

POINTS = [(430.0, 520.0, 1), (610.0, 380.0, 1), (90.0, 900.0, 0)]
BOX = (250.0, 200.0, 800.0, 760.0)
CASES: dict[str, dict[str, Any]] = {
    "point": {"points": POINTS[:1]},
    "points": {"points": POINTS},
    "box": {"box": BOX},
    "box and points": {"points": POINTS, "box": BOX},
}
REFINED = "refined mask"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("full_size") / "sam3.pt"
    save_random_checkpoint(Architecture(), path, seed=0)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def repository(checkpoint: Path) -> Path:
    """Exported with the command that users run; its own check must pass."""
    output = checkpoint.parent / "models"
    command = ["--checkpoint", str(checkpoint), "--output", str(output)]
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "export", *command], check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"\nexport: {time.monotonic() - started:.0f} s, peak {peak:.1f} GiB")
    return output


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[TritonServer]:
    with TritonServer(repository, log=repository.parent / "tritonserver.log") as running:
        yield running


@pytest.fixture(scope="module")
def photo() -> NDArray[np.uint8]:
    """A photo already at the encoder's size, so that both sides get exactly the same pixels."""
    return load_photo("coffee", SIDE)


@pytest.fixture(scope="module")
def meta(checkpoint: Path, photo: NDArray[np.uint8]) -> Any:
    predictor = meta_predictor(checkpoint)
    started = time.monotonic()
    predictor.set_image(photo)
    print(f"\nMeta's set_image: {time.monotonic() - started:.0f} s")
    return predictor


@pytest.fixture(scope="module")
def features(server: TritonServer, photo: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
    """The served encoder's outputs."""
    client = triton.InferenceServerClient(server.grpc_url.removeprefix("grpc://"))
    started = time.monotonic()
    answer = client.infer("sam3_image_encoder", [_tensor("image", photo[None], "UINT8")])
    print(f"\nserved encoder: {time.monotonic() - started:.0f} s, {_memory_of(server)}")
    return {name: answer.as_numpy(name) for name in FEATURES}


def test_encoder_outputs_match(meta: Any, features: dict[str, NDArray[np.float32]]) -> None:
    expected = [meta._features["image_embed"], *meta._features["high_res_feats"]]
    for name, theirs in zip(FEATURES, expected, strict=True):
        error = relative_error(torch.from_numpy(features[name]), theirs)
        print(f"\n{name}: relative error {error:.1e}")
        assert error <= FEATURE_TOLERANCE, name


@pytest.mark.semantic(
    "full size",
    "mask logits of points, box, both, refinement: relative error ≤ 1e-3",
    "Meta's predictor",
)
@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("case", [*CASES, REFINED])
def test_mask_logits_match(
    case: str,
    multimask: bool,
    meta: Any,
    server: TritonServer,
    features: dict[str, NDArray[np.float32]],
) -> None:
    """All three candidates, or the single one, as Triton returns them, against the low-resolution
    logits of `predict`."""
    prompt = CASES.get(case, CASES["point"])
    ours = _decode(server, features, prompt, multimask)
    theirs = predict(meta, prompt, multimask)[2]
    if case == REFINED:
        ours, theirs = (
            _decode(server, features, prompt, multimask, ours[:1]),
            predict(meta, prompt, multimask, theirs[:1])[2],
        )
    errors = [
        relative_error(torch.from_numpy(a), torch.from_numpy(b))
        for a, b in zip(ours, theirs, strict=True)
    ]
    print(f"\n{case}, K = {len(theirs)}: logits' relative error {max(errors):.1e}")
    assert max(errors) <= LOGIT_TOLERANCE


@pytest.mark.semantic(
    "full size",
    "masks of points, box, box with points, refinement, through the client: IoU ≥ 0.999",
    "Meta's predictor",
)
@pytest.mark.parametrize("multimask", [True, False])
def test_masks_match_through_ensemble_and_client(
    multimask: bool, meta: Any, server: TritonServer, photo: NDArray[np.uint8]
) -> None:
    """One request with every kind of prompt, then a refinement on the kept image."""
    prompts = [Prompt(**prompt) for prompt in CASES.values()]
    with Client(server.grpc_url, timeout=600) as client:
        first = client.segment(photo, prompts=prompts, multimask_output=multimask)
        again = [Prompt(points=POINTS[:1], mask=first.logits[0])]
        refined = client.segment(photo, prompts=again, multimask_output=multimask)
    answers = dict(zip(CASES, first, strict=True)) | {REFINED: refined[0]}
    best = None
    for case, answer in answers.items():
        masks, scores, logits = predict(
            meta, CASES.get(case, CASES["point"]), multimask, best if case == REFINED else None
        )
        chosen = int(scores.argmax())
        best = logits[chosen : chosen + 1] if case == "point" else best
        iou = mask_iou(torch.from_numpy(answer.mask.copy()), torch.from_numpy(masks[chosen] > 0))
        print(f"\n{case}: mask IoU {iou:.5f}, score {answer.score:.4f} and {scores[chosen]:.4f}")
        assert iou >= MIN_IOU, case
        assert answer.score == pytest.approx(float(scores[chosen]), abs=1e-3)


def _decode(
    server: TritonServer,
    features: dict[str, NDArray[np.float32]],
    prompt: dict[str, Any],
    multimask: bool,
    mask: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Call the decoder alone, in the wire contract's terms: logits [K, M, M]."""
    box = prompt.get("box", ())
    tokens = [(*box[:2], 2), (*box[2:], 3)] if box else []
    tokens += prompt.get("points", [])
    coords = np.array([[[t[:2] for t in tokens]]], np.float32) / SIDE
    labels = np.array([[[t[2] for t in tokens]]], np.int32)
    inputs = [_tensor(name, array, "FP32") for name, array in features.items()]
    inputs += [_tensor("point_coords", coords, "FP32"), _tensor("point_labels", labels, "INT32")]
    inputs.append(_tensor("multimask_output", np.array([[multimask]]), "BOOL"))
    if mask is not None:
        inputs.append(_tensor("mask_input", mask[None].astype(np.float16), "FP16"))
    client = triton.InferenceServerClient(server.grpc_url.removeprefix("grpc://"))
    answer = client.infer("sam3_prompt_decoder", inputs)
    logits: NDArray[np.float32] = answer.as_numpy("low_res_masks")[0, 0].astype(np.float32)
    return logits


def _tensor(name: str, array: NDArray[Any], datatype: str) -> triton.InferInput:
    tensor = triton.InferInput(name, array.shape, datatype)
    tensor.set_data_from_numpy(array)
    return tensor


def _memory_of(server: TritonServer) -> str:
    """Peak resident memory of tritonserver and its stubs."""
    import psutil

    parent = psutil.Process(server.pid)
    peaks = []
    for process in (parent, *parent.children(recursive=True)):
        status = Path(f"/proc/{process.pid}/status").read_text()
        peaks += [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")]
    return f"peak {sum(peaks) / 2**20:.1f} GiB in {len(peaks)} processes"
