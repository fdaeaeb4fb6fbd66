"""The tiny model as the decoder's program, and as Meta's predictor; Triton's module, made here."""

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
    """As they were: a decoder on a CPU makes them zeros for its process."""
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
    """RGB [S, S, 3] at the tiny model's size, so that nobody resizes it."""
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
    """Triton's module; what needs it is imported anew, and forgotten in the end."""
    module = make_backend()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        # It sets variables for its process, which here starts servers as well.
        patch.setitem(sys.modules, "environment", ModuleType("environment"))
        for name in USERS:
            patch.delitem(sys.modules, name, raising=False)
        yield module
        for name in USERS:
            sys.modules.pop(name, None)
