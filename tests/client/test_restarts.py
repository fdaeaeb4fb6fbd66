"""Clients whose server is killed and started again under them."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from server import TritonServer
from tests.client.statistics import encodings
from tests.client.test_shared_memory import files, regions
from triton_sam3 import AsyncClient, Client, ServerUnreachable

Pixels = NDArray[np.uint8]
Fresh = Callable[[], Pixels]
POINTS = [(110, 80)]


@pytest.fixture(scope="module")
def spare_server(
    repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    """A second server, for `own_server`."""
    log = tmp_path_factory.mktemp("spare") / "tritonserver.log"
    with TritonServer(repository, log=log) as running:
        yield running
        running.kill()  # an orderly end takes seconds, and has tests of its own


@pytest.fixture
def own_server(spare_server: TritonServer) -> TritonServer:
    """A server that may be killed and started again; it runs when the test starts."""
    return spare_server if spare_server.is_alive() else spare_server.start()


@pytest.mark.semantic("session", "a server killed between two clicks goes unnoticed", "equality")
async def test_a_restarted_server_goes_unnoticed(
    own_server: TritonServer, coins: Pixels, fresh: Fresh
) -> None:
    """By blocking and by awaited views over both protocols, and where memory is shared."""
    urls, image = (own_server.grpc_url, own_server.http_url), fresh()
    async with AsyncExitStack() as stack:
        clients = [stack.enter_context(Client(url)) for url in urls]
        views = [stack.enter_context(client.open(coins)) for client in clients]
        others = [await stack.enter_async_context(AsyncClient(url)) for url in urls]
        awaited = [await stack.enter_async_context(client.open(coins)) for client in others]
        sharing = stack.enter_context(Client(urls[0], shared_memory="system"))
        untouched = [[view.click(110, 80), view.click(60, 200)] for view in views]
        for view in views:
            view.undo()
        first = [await view.click(110, 80) for view in awaited]
        shared = sharing.segment(image, POINTS)

        own_server.kill()
        await asyncio.to_thread(own_server.start)
        before = encodings(own_server)

        for view, expected in zip(views, untouched, strict=True):
            np.testing.assert_array_equal(view.click(60, 200).logits, expected[1].logits)
            assert view.undo() is expected[0]
        assert encodings(own_server) == before + 2
        for client in clients:
            client.segment(coins, POINTS)
        assert encodings(own_server) == before + 2

        for one, result, expected in zip(awaited, first, untouched, strict=True):
            refined = await one.click(60, 200)
            np.testing.assert_array_equal(refined.logits, expected[1].logits)
            assert await one.undo() is result
        assert encodings(own_server) == before + 4

        np.testing.assert_array_equal(sharing.segment(image, POINTS).logits, shared.logits)
        sharing.segment(fresh(), POINTS)
        assert encodings(own_server) == before + 6
        assert len(regions(own_server)) == 1
    assert regions(own_server) == []
    assert files() == []


def test_a_click_during_a_restart_succeeds_or_leaves_the_object_unchanged(
    own_server: TritonServer, coins: Pixels
) -> None:
    url = own_server.grpc_url
    with (
        # Tried again, because gRPC may still believe the server to be down when it is back.
        Client(url, retries=4) as client,
        Client(url, retries=1000) as patient,
        client.open(coins) as view,
        patient.open(coins) as waiting,
        ThreadPoolExecutor(1) as pool,
    ):
        first = view.click(110, 80)
        own_server.kill()
        click = pool.submit(waiting.click, 110, 80)
        with pytest.raises(ServerUnreachable):
            view.click(60, 200)
        assert not click.done()
        own_server.start()
        view.click(60, 200)
        assert view.undo() is first
        assert len(click.result()) == 1
