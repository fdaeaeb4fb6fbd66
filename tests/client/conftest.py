"""What several of the client's tests compare with."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import skimage.data
from hypothesis import settings
from numpy.typing import NDArray

from server import TritonServer

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def reference() -> Callable[..., Any]:
    """Meta's own pre- and post-processing, `SAM2Transforms`, made for a side of the input."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about CUDA and TorchScript, on import
        from sam3.model.utils.sam1_utils import SAM2Transforms

        def make(side: int, max_hole_area: float = 256.0) -> Any:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return SAM2Transforms(side, 0.0, max_hole_area=max_hole_area)

    return make


@pytest.fixture(scope="session")
def coins() -> NDArray[np.uint8]:
    """A photo: RGB uint8 [303, 384, 3]."""
    return np.repeat(skimage.data.coins()[:, :, np.newaxis], 3, axis=2)


@pytest.fixture(params=["grpc", "http"])
def url(request: pytest.FixtureRequest, server: TritonServer) -> str:
    """The served demo model's URL, for either protocol."""
    return {"grpc": server.grpc_url, "http": server.http_url}[request.param]


@pytest.fixture
def fresh(coins: NDArray[np.uint8]) -> Callable[[], NDArray[np.uint8]]:
    """Makes photos that no server has seen: the coins with noise."""
    seeds = np.random.default_rng()

    def make() -> NDArray[np.uint8]:
        noise = seeds.integers(0, 8, coins.shape, dtype=np.uint8)
        return coins // 2 + noise

    return make
