"""Served with little space for kept images, or none: which ids are valid, and what clients do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from benchmarks.faults.stand import variant
from export.repository import DECODER, ENCODER, read_config
from server import TritonServer
from tests.client.statistics import encodings
from tests.model_repository.sam3_prompt_decoder.served import (
    ENSEMBLE,
    FEATURES,
    NOT_FOUND,
    Array,
    Arrays,
    Served,
    alike,
    by_id,
    clicks,
    flag,
    id_of,
)
from triton_sam3 import Client


@contextmanager
def serving(repository: Path, folder: Path, kept_bytes: int) -> Iterator[Served]:
    with TritonServer(variant(repository, folder, kept_bytes)) as server:
        yield Served(server)
        server.kill()


def bytes_of_one_image(repository: Path) -> int:
    dims = {tensor.name: tensor.dims for tensor in read_config(repository, DECODER).input}
    return sum(4 * int(np.prod(dims[name])) for name in FEATURES)


@pytest.fixture(scope="module")
def pictures(repository: Path) -> Array:
    side = read_config(repository, ENCODER).input[0].dims[0]
    return np.random.default_rng(0).integers(0, 256, (3, side, side, 3), dtype=np.uint8)


def keep(served: Served, picture: Array) -> Arrays:
    return served.ask(ENSEMBLE, image=picture[None], **clicks(1), keep_image=flag(True))


@pytest.mark.semantic(
    "session", "a server with room for two images forgets the third", "the contract"
)
def test_room_for_two_images(repository: Path, tmp_path: Path, pictures: Array) -> None:
    """The one clicked least recently is evicted, and a view of it sends it again automatically."""
    with serving(repository, tmp_path, 2 * bytes_of_one_image(repository)) as served:
        first, second = (keep(served, picture) for picture in pictures[:2])
        served.ask(DECODER, **by_id(id_of(first)), **clicks(1))
        third = keep(served, pictures[2])
        said = served.refused(DECODER, NOT_FOUND, **by_id(id_of(second)), **clicks(1))
        assert said.startswith("image_id not found")
        for answer in (first, third):
            clicked = served.ask(DECODER, **by_id(id_of(answer)), **clicks(1))
            alike(clicked["low_res_masks"], answer["low_res_masks"])
        with Client(served.server.grpc_url) as client, client.open(pictures[0]) as view:
            before = view.click(20, 20)
            view.undo()
            keep(served, pictures[1])
            keep(served, pictures[2])
            encoded = encodings(served.server)
            after = view.click(20, 20)
            assert encodings(served.server) == encoded + 1
        np.testing.assert_allclose(after.logits, before.logits, atol=2e-2)


@pytest.mark.semantic(
    "session", "a server that keeps no image answers clicks all the same", "equality"
)
def test_no_room_for_any_image(
    repository: Path, tmp_path: Path, pictures: Array, server: TritonServer
) -> None:
    """An id is empty, and clients send the image with every click."""
    with serving(repository, tmp_path, 0) as served:
        assert id_of(keep(served, pictures[0])) == ""
        with Client(served.server.grpc_url) as client, client.open(pictures[0]) as view:
            encoded = encodings(served.server)
            unkept = [view.click(20, 20), view.click(40, 30, positive=False)]
            assert encodings(served.server) == encoded + 2
    with Client(server.grpc_url) as client, client.open(pictures[0]) as view:
        kept = [view.click(20, 20), view.click(40, 30, positive=False)]
    for ours, theirs in zip(unkept, kept, strict=True):
        np.testing.assert_allclose(ours.logits, theirs.logits, atol=2e-2)
