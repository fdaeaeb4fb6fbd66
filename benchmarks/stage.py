"""One model served at once in every way to be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import skimage.data
from numpy.typing import NDArray

from benchmarks.artifacts import Artifacts
from benchmarks.peers import Click, Peer, Photo, http_service, whole
from benchmarks.peers.embeddings import EmbeddingsOverTheWire
from benchmarks.peers.http import OverHttp
from benchmarks.peers.in_process import InProcess
from benchmarks.peers.ours import Ours
from benchmarks.wire import Wire
from demo.prompts import iou
from server import TritonServer
from triton_sam3 import contract
from triton_sam3.geometry import resize

OURS, EMBEDDINGS, WHOLE, HTTP, IN_PROCESS = (
    "ours",
    "embeddings over the wire",
    "Meta's predictor in a Triton Python backend",
    "Meta's predictor behind HTTP",
    "Meta's predictor in process",
)
PEERS = (OURS, EMBEDDINGS, WHOLE, HTTP, IN_PROCESS)
AGREEMENT = 0.97
"""Minimum mask IoU with Meta's predictor: resizing and rounding may move a border by a pixel."""
PLACE = (300.0, 200.0)
"""Where single clicks go, in pixels of the photo."""


class Disagreement(Exception):
    """Two peers gave different masks, so their times must not be compared."""


def load_photo() -> Photo:
    """RGB [400, 600, 3], from scikit-image's wheel."""
    photo: NDArray[np.uint8] = np.ascontiguousarray(skimage.data.coffee())
    return photo


@dataclass(frozen=True)
class Stage:
    """Servers and peers of one model, and a photo opened with each."""

    artifacts: Artifacts
    photo: Photo
    wire: Wire
    metrics_url: str
    """The metrics endpoint of our server."""
    makers: dict[str, Callable[[], Peer]]
    """How to make another caller of the same servers; picklable, except for the one in process."""
    peers: dict[str, Peer]
    clicks: dict[str, Click]
    agreement: dict[str, float]
    """Mask IoU of each peer's click with Meta's predictor's."""

    @property
    def ours(self) -> Ours:
        """The first of the peers."""
        peer = self.peers[OURS]
        assert isinstance(peer, Ours)
        return peer

    def keep_photo(self) -> dict[str, NDArray[Any]]:
        """Have our server keep the photo, and return the input that refers to it."""
        return {contract.IMAGE_ID.name: self.wire.keep(resize(self.photo, self.wire.side))}


@contextmanager
def stage(
    artifacts: Artifacts,
    names: Sequence[str] = PEERS,
    *,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda _: None,
    agreement: float = AGREEMENT,
) -> Iterator[Stage]:
    """Start what the peers in `names` need, open the photo with each, and check that masks agree.

    Raises Disagreement if a mask's IoU with the one of Meta's predictor is below `agreement`.
    """
    with ExitStack() as cleanup:
        progress(f"{artifacts.name}: starting servers")
        server = cleanup.enter_context(TritonServer(artifacts.repository))
        makers: dict[str, Callable[[], Peer]] = {
            OURS: partial(Ours, server.grpc_url),
            EMBEDDINGS: partial(EmbeddingsOverTheWire, server.grpc_url),
            IN_PROCESS: partial(InProcess, artifacts.checkpoint, device),
        }
        if WHOLE in names:
            folder = cleanup.enter_context(TemporaryDirectory(prefix="triton-sam3-bench-"))
            repository = whole.write_repository(Path(folder), artifacts.checkpoint, device)
            other = cleanup.enter_context(TritonServer(repository))
            makers[WHOLE] = partial(whole.WholeInTriton, other.grpc_url)
        if HTTP in names:
            address = cleanup.enter_context(http_service.running(artifacts.checkpoint, device))
            makers[HTTP] = partial(OverHttp, *address)
        photo = load_photo()
        made: dict[str, Peer] = {}
        for name in names:
            made[name] = makers[name]()
            cleanup.callback(made[name].close)
        clicks = _opened(artifacts.name, photo, made, progress)
        agreements = _check_agreement(clicks, agreement)
        wire = Wire(server.grpc_url)
        cleanup.callback(wire.close)
        url = server.metrics_url
        yield Stage(artifacts, photo, wire, url, makers, made, clicks, agreements)


def _opened(
    model: str, photo: Photo, made: dict[str, Peer], progress: Callable[[str], None]
) -> dict[str, Click]:
    clicks: dict[str, Click] = {}
    for name, peer in made.items():
        progress(f"{model}: opening the photo, {name}")
        clicks[name] = peer.open(photo)
    return clicks


def _check_agreement(clicks: dict[str, Click], min_iou: float) -> dict[str, float]:
    reference = clicks[IN_PROCESS](*PLACE)
    ious = {name: iou(click(*PLACE), reference) for name, click in clicks.items()}
    for name, agreement in ious.items():
        if agreement < min_iou:
            raise Disagreement(
                f"{name}: mask IoU with Meta's predictor is {agreement:.3f}, expected {min_iou}"
            )
    return ious
