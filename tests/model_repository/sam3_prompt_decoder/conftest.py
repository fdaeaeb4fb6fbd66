"""The tiny model as the decoder's program and as Meta's predictor, and a fake Triton module."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from decoder import Decoder
from numpy.typing import NDArray

from benchmarks.reference import meta_predictor
from export.repository import DECODER
from tests.export import tiny
from tests.model_repository.sam3_prompt_decoder.backend import USERS, make_backend


@pytest.fixture(autouse=True)
def denormals() -> Iterator[None]:
    """Restore denormals: a decoder on a CPU flushes them to zero for its whole process."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def program(exported: tiny.Export) -> Path:
    return exported.repository / DECODER / "1" / "decoder.pt2"


@pytest.fixture(scope="module")
def decoder(program: Path) -> Decoder:
    return Decoder(program, torch.device("cpu"))


@pytest.fixture(scope="session")
def picture() -> NDArray[np.uint8]:
    """RGB [S, S, 3] at the tiny model's size, so that it is not resized."""
    side = tiny.ARCHITECTURE.image_size
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def meta(exported: tiny.Export, picture: NDArray[np.uint8]) -> Any:
    """Meta's predictor, its image set to `picture`."""
    predictor = meta_predictor(exported.checkpoint)
    predictor.set_image(picture)
    return predictor


@pytest.fixture(scope="module")
def backend() -> Iterator[Any]:
    """Triton's module; modules that need it are imported anew, and removed at the end."""
    module = make_backend()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        # It sets variables for its process, which also starts servers here.
        patch.setitem(sys.modules, "environment", ModuleType("environment"))
        for name in USERS:
            patch.delitem(sys.modules, name, raising=False)
        yield module
        for name in USERS:
            sys.modules.pop(name, None)
