"""Requests that Triton merges are decoded in batches on a GPU; here by a CPU's decoder in the same
order: the next batch is started before the previous one is answered."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from export.repository import DECODER, ENCODER
from server import TritonServer
from tests.client.statistics import executions
from tests.model_repository.sam3_prompt_decoder.served import (
    ENSEMBLE,
    Array,
    Served,
    alike,
    by_id,
    clicks,
    flag,
    id_of,
)
from tests.stubs import suspended_model

REQUESTS = 10
PART = 3


@pytest.fixture(scope="module")
def in_parts(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("parts") / "models"
    shutil.copytree(repository, folder)
    code = folder / DECODER / "1" / "decoder.py"
    whole = '0 if self.device.type == "cpu" else REPLAYED_OBJECTS'
    assert whole in code.read_text()
    code.write_text(code.read_text().replace(whole, str(PART)))
    with TritonServer(folder) as server:
        yield Served(server)
        server.kill()


@pytest.fixture
def kept(in_parts: Served) -> list[dict[str, Array]]:
    side = in_parts.dims(ENCODER)["image"][0]
    pictures = np.random.default_rng(0).integers(0, 256, (2, 1, side, side, 3), dtype=np.uint8)
    answers = [
        in_parts.ask(ENSEMBLE, image=picture, **clicks(1), keep_image=flag(True))
        for picture in pictures
    ]
    return [by_id(id_of(answer)) for answer in answers]


def test_each_request_of_each_batch_gets_its_own_answer(
    in_parts: Served, kept: list[dict[str, Array]]
) -> None:
    """Invalid ones in between are rejected on their own."""
    wrong = {4, 7}
    requests = [{**kept[n % 2], **clicks(1 + n % 2, seed=n)} for n in range(REQUESTS)]
    expected = [in_parts.ask(DECODER, **request) for request in requests]
    requests[4] = {**requests[4], **by_id("never issued")}
    requests[7] = {**requests[7], "point_labels": np.full_like(requests[7]["point_labels"], 9)}
    before = executions(in_parts.server, DECODER)
    with suspended_model(in_parts.server):
        pending = in_parts.send(DECODER, requests)
        in_parts.wait_for_queue(REQUESTS - PART)
    answers = [future.result(timeout=120) for future in pending]
    assert executions(in_parts.server, DECODER) - before < REQUESTS / PART  # they were merged
    for n, (answer, alone) in enumerate(zip(answers, expected, strict=True)):
        if n in wrong:
            assert isinstance(answer, Exception)
        else:
            alike(answer["low_res_masks"], alone["low_res_masks"])
            alike(answer["iou_predictions"], alone["iou_predictions"])
