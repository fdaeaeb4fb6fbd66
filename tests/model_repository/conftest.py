"""What tests of the served models share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import skimage.data
from PIL import Image

from server import TritonServer
from tests.model_repository.asking import Ask, connect
from triton_sam3 import Client


@pytest.fixture(scope="session")
def ask(server: TritonServer) -> Iterator[Ask]:
    """Send named arrays to a served model; the answer's arrays by name."""
    with connect(server.grpc_url.removeprefix("grpc://")) as ask_served:
        yield ask_served


@pytest.fixture(scope="session")
def client(server: TritonServer) -> Iterator[Client]:
    """The Python client, which remembers nothing: every answer is computed."""
    with Client(server.grpc_url, remember_images=0) as connected:
        yield connected


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JPEG of 600×400 pixels."""
    path = tmp_path_factory.mktemp("photos") / "photo.jpg"
    Image.fromarray(skimage.data.coffee()).save(path, quality=92)
    return path


@pytest.fixture(scope="session")
def image_side(client: Client) -> int:
    """S, the side of the encoder's input."""
    served = client.status().served
    assert served is not None
    return served.image_side
