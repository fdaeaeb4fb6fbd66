"""Images that reach the real server through shared memory."""

import asyncio
import gc
import logging
import mmap
import os
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from numpy.typing import NDArray

from server import TritonServer
from tests.client.statistics import encodings
from tests.client.test_regions import dying
from tests.client.wire import wire
from tests.stubs import suspended_model
from triton_sam3 import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    InvalidRequest,
    SAM3Error,
    ServerUnreachable,
    TransportError,
    shared_memory,
)
from triton_sam3 import regions as shared_regions
from triton_sam3.flow import Call, Flow, Infer, InSharedMemory, Query, Sleep
from triton_sam3.regions import SYSTEM_FOLDER, SystemRegion, new_name, owner_is_dead
from triton_sam3.retry import Retries
from triton_sam3.shared_memory import SharedMemory
from triton_sam3.steps import perform
from triton_sam3.translation import RegionInUse, RegionKnown, RegionLost

Pixels = NDArray[np.uint8]
Fresh = Callable[[], Pixels]
POINTS = [(110, 80)]


def regions(server: TritonServer) -> list[str]:
    """Names of the regions that the server has mapped."""
    client = tritonclient.grpc.InferenceServerClient(server.grpc_url.removeprefix("grpc://"))
    try:
        return list(client.get_system_shared_memory_status(as_json=True).get("regions", {}))
    finally:
        client.close()


def files() -> list[str]:
    """This process's regions, and those of processes that have ended; other tests' come and go."""
    names = [path.name for path in SYSTEM_FOLDER.glob("sam3_client_*")]
    return [name for name in names if f"_{os.getpid()}_" in name or owner_is_dead(name)]


@pytest.fixture(autouse=True)
def nothing_is_left(server: TritonServer) -> Iterator[None]:
    yield
    assert regions(server) == []
    assert files() == []


@pytest.mark.semantic(
    "ways to call",
    "through shared memory: the same answer, and no image in the request",
    "equality",
)
def test_the_answer_is_the_same_and_the_image_is_not_in_the_request(
    url: str, fresh: Fresh, server: TritonServer
) -> None:
    image = fresh()
    with Client(url) as client:
        expected = client.segment(image, POINTS)
    with wire(url) as counted, Client(counted.url, shared_memory="system") as client:
        result = client.segment(image, POINTS)
        # Not to the bit: a batch that others share is computed in another order.
        np.testing.assert_allclose(result.logits, expected.logits, atol=2e-2)
        assert counted.sent < 5_000
        assert len(regions(server)) == 1
        assert files() == []  # gone as soon as the server has it mapped
        for _ in range(3):
            client.segment(fresh(), POINTS)
        assert len(regions(server)) == 1  # used again
    assert regions(server) == []


@pytest.mark.gpu
@pytest.mark.skipif(not Path("/dev/nvidia0").exists(), reason="no NVIDIA GPU")
def test_the_answer_through_gpu_memory_is_the_same(url: str, fresh: Fresh) -> None:
    image = fresh()
    with Client(url) as client, Client(url, shared_memory="cuda") as sharing:
        expected = client.segment(image, POINTS)
        np.testing.assert_array_equal(sharing.segment(image, POINTS).masks, expected.masks)


async def test_requests_at_the_same_time_do_not_share_a_region(url: str, fresh: Fresh) -> None:
    images = [np.roll(fresh(), 31 * number, axis=1) for number in range(6)]
    async with AsyncClient(url) as client:
        expected = [await client.segment(image, POINTS) for image in images]
    async with AsyncClient(url, shared_memory="system", remember_images=0) as client:
        results = await asyncio.gather(*(client.segment(image, POINTS) for image in images))
    for result, reference in zip(results, expected, strict=True):
        np.testing.assert_allclose(result.logits, reference.logits, atol=2e-2)


def test_a_garbage_collected_client_frees_its_regions(
    url: str, coins: Pixels, server: TritonServer
) -> None:
    client = Client(url, shared_memory="system")
    client.segment(coins, POINTS)
    assert len(regions(server)) == 1
    del client
    assert regions(server) == []


@pytest.mark.semantic(
    "ways to call", "a killed caller's shared memory is taken back", "bytes counted"
)
def test_the_regions_of_a_killed_client_are_freed_by_the_next_one(
    url: str, coins: Pixels, server: TritonServer
) -> None:
    dying(
        "import numpy as np\n"
        "from triton_sam3 import Client\n"
        f"client = Client({url!r}, shared_memory='system')\n"
        "client.segment(np.zeros((50, 60, 3), np.uint8), points=[(5, 5)])"
    )
    assert len(regions(server)) == 1
    assert files() == []
    with Client(url, shared_memory="system") as client:
        client.segment(coins, POINTS)
        assert len(regions(server)) == 1


def test_a_region_in_use_is_waited_for(
    url: str, coins: Pixels, server: TritonServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(url, shared_memory="system", remember_images=0) as client:
        client.segment(coins, POINTS)  # it has a region from now on
        with suspended_model(server), monkeypatch.context() as impatient:
            impatient.setattr(client, "_timeout", 0.2)
            with pytest.raises(DeadlineExceeded):
                client.segment(coins, POINTS)
            assert len(regions(server)) == 1
    assert regions(server) == []


def test_closing_frees_the_regions_of_requests_in_flight(
    url: str, coins: Pixels, server: TritonServer
) -> None:
    boxes = [(10 + n, 10, 60 + n, 60) for n in range(30)]
    client = Client(url, shared_memory="system")
    with ThreadPoolExecutor(2) as pool:
        images = (coins, coins[::-1].copy())
        pending = [pool.submit(client.segment, image, boxes=boxes) for image in images]
        until = time.monotonic() + 30
        while not regions(server) and time.monotonic() < until:
            time.sleep(0.002)
        client.close()
        assert regions(server) == []
    for answer in pending:
        error = answer.exception()
        assert error is None or "is closed" in str(error)


def test_regions_left_by_closing_are_freed_by_a_later_client_of_the_process(
    url: str, coins: Pixels, server: TritonServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(url, shared_memory="system", remember_images=0)
    client.segment(coins, POINTS)
    before, until = encodings(server), time.monotonic() + 30
    with ThreadPoolExecutor(1) as pool, suspended_model(server):
        pending = pool.submit(client.segment, coins, POINTS)
        while encodings(server) == before and time.monotonic() < until:
            pass  # it takes a moment itself
        (given_up,) = regions(server)
        with monkeypatch.context() as impatient:
            impatient.setattr(shared_memory, "_CLOSE_TIMEOUT", 0.001)
            client.close()
        assert pending.exception() is not None
    assert regions(server) == [given_up]
    while given_up in regions(server) and time.monotonic() < until:
        with Client(url, shared_memory="system") as later:  # once the server has put it away
            later.segment(coins, POINTS)
    assert given_up not in regions(server)


@contextmanager
def no_large_files() -> Iterator[None]:
    """No file of this process may grow beyond half a region: /dev/shm is as good as full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_without_memory_to_share_the_image_is_sent_in_the_request(
    url: str, coins: Pixels, caplog: pytest.LogCaptureFixture
) -> None:
    client = Client(url, shared_memory="system")
    with client, no_large_files(), caplog.at_level(logging.WARNING):
        result = client.segment(coins, POINTS, threshold=-1)
    assert len(result) == 1
    assert "no shared memory" in caplog.text


class FakeTransport:
    """A transport whose server is a function; it keeps what was sent, in order."""

    def __init__(self, answer: Callable[[Infer | Query], Any]) -> None:
        self._answer = answer
        self.sent: list[Infer | Query] = []

    def call(self, call: Call) -> Any:
        self.sent.append(call.request)
        return self._answer(call.request)

    def close(self) -> None: ...


def perform_with_fake_server(
    flow: Flow[Any], answer: Callable[[Infer | Query], Any]
) -> list[Infer | Query]:
    """Perform `flow`, `answer` in the server's place, to its end or failure; what it sent."""
    server = FakeTransport(answer)
    with suppress(SAM3Error):
        perform(flow, server)
    return server.sent


def an_image(memory: SharedMemory) -> Flow[Any]:
    image: NDArray[np.uint8] = np.zeros((1, 200, 200, 3), np.uint8)
    return memory.send(Infer("sam3_interactive", {"image": image}, ()), Retries(0))


def answering(error: BaseException | None, to: str = "infer") -> Callable[[Infer | Query], Any]:
    """Inferences, or else the calls whose names begin with `to`, fail with `error`."""

    def answer(request: Infer | Query) -> Any:
        name = request.method if isinstance(request, Query) else "infer"
        if error is not None and name.startswith(to):
            raise error
        return {}

    return answer


def region_of(sent: list[Infer | Query]) -> str:
    (infer,) = (request for request in sent if isinstance(request, Infer))
    placed = infer.inputs["image"]
    assert isinstance(placed, InSharedMemory)
    return placed.region


_STATUS = Query("get_system_shared_memory_status")


def unregistering(region: str) -> Query:
    return Query("unregister_system_shared_memory", (region,))


def test_a_region_without_an_answer_is_not_used_again() -> None:
    memory = SharedMemory("system")
    first = perform_with_fake_server(an_image(memory), answering(DeadlineExceeded("late")))
    second = perform_with_fake_server(
        an_image(memory), answering(InvalidRequest("no, but an answer"))
    )
    third = perform_with_fake_server(an_image(memory), answering(None))
    assert region_of(first) != region_of(second) == region_of(third)
    assert unregistering(region_of(first)) in second
    assert [type(request) for request in third] == [Infer]


def test_a_request_does_not_wait_for_a_region_in_use() -> None:
    memory = SharedMemory("system")
    lost = region_of(
        perform_with_fake_server(an_image(memory), answering(DeadlineExceeded("late")))
    )
    second = perform_with_fake_server(
        an_image(memory), answering(RegionInUse("still in use"), to="unregister")
    )
    assert second.count(unregistering(lost)) == 1
    assert region_of(second) != lost
    closing = perform_with_fake_server(memory.close(), answering(None))
    assert sorted(closing, key=str) == sorted(
        [unregistering(lost), unregistering(region_of(second))], key=str
    )


def test_closing_does_not_wait_forever_for_a_region_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = SharedMemory("system")
    region = region_of(perform_with_fake_server(an_image(memory), answering(None)))
    seconds = iter(range(100))
    monkeypatch.setattr("triton_sam3.shared_memory.monotonic", lambda: float(next(seconds)))
    closing = perform_with_fake_server(
        memory.close(), answering(RegionInUse("still in use"), to="unregister")
    )
    assert 1 < closing.count(unregistering(region)) < 10


def test_a_silent_server_is_asked_about_one_lost_region_only() -> None:
    memory = SharedMemory("system")
    perform_with_fake_server(an_image(memory), answering(DeadlineExceeded("late")))
    silent = answering(DeadlineExceeded("late"), to="unregister")
    for _ in range(3):
        perform_with_fake_server(an_image(memory), silent)
        memory._mark_all_lost()
    sent = [str(request) for request in perform_with_fake_server(an_image(memory), silent)]
    assert sum("unregister" in request for request in sent) == 1
    left = perform_with_fake_server(memory.close(), silent)
    assert len(left) == 1
    assert isinstance(left[0], Query)
    (region,) = left[0].args

    def answer(request: Infer | Query) -> Any:
        return {"regions": {"0": {"name": region}}} if request == _STATUS else {}

    assert unregistering(str(region)) in perform_with_fake_server(
        an_image(SharedMemory("system")), answer
    )


@pytest.mark.parametrize("error", [DeadlineExceeded("late"), KeyboardInterrupt()])
def test_a_region_whose_registration_failed_is_freed(error: BaseException) -> None:
    memory = SharedMemory("system")
    with suppress(KeyboardInterrupt):
        perform_with_fake_server(an_image(memory), answering(error, to="register"))
    (name,) = files()
    assert perform_with_fake_server(memory.close(), answering(None)) == [unregistering(name)]


def test_a_region_that_could_not_be_unregistered_is_freed_later() -> None:
    memory = SharedMemory("system")
    region = region_of(perform_with_fake_server(an_image(memory), answering(None)))
    with suppress(KeyboardInterrupt):
        perform_with_fake_server(memory.close(), answering(KeyboardInterrupt(), to="unregister"))
    assert perform_with_fake_server(memory.close(), answering(None)) == [unregistering(region)]


def test_closing_waits_for_a_request_in_flight_and_gives_out_no_region() -> None:
    memory = SharedMemory("system")
    busy = an_image(memory)
    step = next(busy)
    while not (isinstance(step, Call) and isinstance(step.request, Infer)):
        step = busy.send({})
    region = region_of([step.request])
    closing = memory.close()
    assert isinstance(next(closing), Sleep)
    later = perform_with_fake_server(an_image(memory), answering(None))
    assert [type(request) for request in later] == [Infer]
    assert isinstance(later[0].inputs["image"], np.ndarray)  # type: ignore[union-attr]
    with pytest.raises(StopIteration):
        busy.send({})
    taking_back = closing.send(None)
    assert isinstance(taking_back, Call)
    assert taking_back.request == unregistering(region)
    with pytest.raises(StopIteration):
        closing.send({})


def test_regions_are_not_swept_on_a_server_on_another_host() -> None:
    """Its list may have regions of living clients of another host."""
    memory = SharedMemory("system")
    elsewhere = answering(InvalidRequest("no such file"), to="register")
    assert _STATUS not in perform_with_fake_server(an_image(memory), elsewhere)
    assert _STATUS in perform_with_fake_server(an_image(memory), answering(None))
    perform_with_fake_server(memory.close(), answering(None))


def test_a_region_whose_sweep_got_no_answer_is_freed() -> None:
    memory = SharedMemory("system")
    silent = answering(DeadlineExceeded("late"), to="get_system")
    register, status = perform_with_fake_server(an_image(memory), silent)
    assert isinstance(register, Query)
    assert status == _STATUS
    closing = perform_with_fake_server(memory.close(), answering(None))
    assert closing == [unregistering(str(register.args[0]))]


def test_without_gpu_memory_the_image_is_sent_in_the_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Failed(Exception):
        pass

    def create(*_: object) -> object:
        if full:
            raise Failed("unable to create cuda shared memory handle")
        return object()

    full = False
    names = {"CudaSharedMemoryException": Failed, "create_shared_memory_region": create}
    library = SimpleNamespace(**names, destroy_shared_memory_region=lambda _: None)
    monkeypatch.setattr(shared_regions, "_cuda", lambda: library)
    memory = SharedMemory("cuda")
    full = True
    (sent,) = perform_with_fake_server(an_image(memory), answering(None))
    assert isinstance(sent, Infer)
    assert isinstance(sent.inputs["image"], np.ndarray)


def test_one_region_in_use_does_not_end_the_sweep() -> None:
    birth = new_name().split("_")[-2]
    dead = [new_name().replace(f"_{birth}_", "_1_") for _ in range(2)]

    def answer(request: Infer | Query) -> Any:
        if isinstance(request, Query) and request.method.startswith("unregister"):
            raise RegionInUse("still in use")
        return {"regions": {name: {"name": name} for name in dead}}

    sent = perform_with_fake_server(an_image(SharedMemory("system")), answer)
    assert all(unregistering(name) in sent for name in dead)


def test_a_server_on_another_host_is_an_error_that_says_so(
    coins: Pixels, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The server looks for the region where this client did not put it, as from another container.
    def elsewhere(region: SystemRegion) -> Query:
        return Query("register_system_shared_memory", (region.name, "/elsewhere", region.size))

    monkeypatch.setattr(SystemRegion, "register", elsewhere)
    expected_error = pytest.raises(TransportError, match="must run on this host")
    with Client(url, shared_memory="system") as client, expected_error:
        client.segment(coins, POINTS)


def sent_at_once(*flows: Flow[Any]) -> list[Infer]:
    """The inferences of flows that all wait for their answers at the same time, then get them."""
    sent = []
    for flow in flows:
        step = next(flow)
        while not (isinstance(step, Call) and isinstance(step.request, Infer)):
            step = flow.send({})
        sent.append(step.request)
    for flow in flows:
        with pytest.raises(StopIteration):
            flow.send({})
    return sent


def test_requests_beyond_the_limit_on_regions_use_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "_MAX_REGIONS", 2)
    memory = SharedMemory("system")
    sent = sent_at_once(*(an_image(memory) for _ in range(3)))
    perform_with_fake_server(memory.close(), answering(None))
    placed = [isinstance(request.inputs["image"], InSharedMemory) for request in sent]
    assert placed == [True, True, False]


def test_a_region_too_small_makes_way_for_a_larger_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "_MAX_REGIONS", 2)
    memory = SharedMemory("system")
    small = [region_of([r]) for r in sent_at_once(an_image(memory), an_image(memory))]
    large: NDArray[np.uint8] = np.zeros((1, 1000, 1000, 3), np.uint8)
    request = Infer("sam3_interactive", {"image": large}, ())
    sent = perform_with_fake_server(memory.send(request, Retries(0)), answering(None))
    assert region_of(sent) not in small
    assert sum(unregistering(name) in sent for name in small) == 1
    perform_with_fake_server(memory.close(), answering(None))


def test_a_region_is_used_that_was_registered_by_a_lost_answer() -> None:
    memory = SharedMemory("system")
    already = RegionKnown("shared memory region 'sam3_client_…' already in manager")
    sent = perform_with_fake_server(an_image(memory), answering(already, to="register"))
    assert isinstance(sent[-1], Infer)
    assert region_of(sent)
    perform_with_fake_server(memory.close(), answering(None))


async def test_an_unclosed_async_clients_regions_are_freed_by_the_next_client(
    url: str, fresh: Fresh, server: TritonServer
) -> None:
    dropped = AsyncClient(url, shared_memory="system")
    await dropped.segment(fresh(), POINTS)
    (region,) = regions(server)
    del dropped
    gc.collect()
    async with AsyncClient(url, shared_memory="system") as client:
        await client.segment(fresh(), POINTS)
        assert region not in regions(server)


def test_no_region_from_before_a_restart_is_used() -> None:
    memory = SharedMemory("system")
    known = {region_of([request]) for request in sent_at_once(an_image(memory), an_image(memory))}

    def restarted(request: Infer | Query) -> Any:
        if isinstance(request, Infer) and (region := region_of([request])) in known:
            raise RegionLost(region)
        return {}

    tries = [
        r for r in perform_with_fake_server(an_image(memory), restarted) if isinstance(r, Infer)
    ]
    perform_with_fake_server(memory.close(), answering(None))
    assert len(known) == len(tries) == 2
    assert region_of([tries[1]]) not in known


def test_closing_asks_a_silent_server_only_once_and_briefly() -> None:
    """A server that hangs or is gone keeps nobody who closes for a request's whole timeout."""
    memory = SharedMemory("system")
    perform_with_fake_server(an_image(memory), answering(None))
    closing = memory.close()
    request = next(closing)
    assert isinstance(request, Call)
    assert request.timeout < 10
    with pytest.raises(StopIteration):  # no pause, no second try
        closing.throw(ServerUnreachable("gone"))


def test_an_image_and_masks_share_a_region_without_overlap() -> None:
    arrays: dict[str, NDArray[Any]] = {
        "image": np.full((1, 500, 500, 3), 7, np.uint8),
        "mask_input": np.full((1, 40, 96, 96), -2.5, np.float16),
    }
    mapped: dict[str, mmap.mmap] = {}

    def reading(request: Infer | Query) -> Any:
        if isinstance(request, Query) and request.method.startswith("register"):
            region = str(request.args[0])
            with (SYSTEM_FOLDER / region).open("rb") as file:
                mapped[region] = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        if isinstance(request, Infer):
            for name, array in arrays.items():
                placed = request.inputs[name]
                assert isinstance(placed, InSharedMemory)
                end = placed.offset + placed.nbytes
                assert mapped[placed.region][placed.offset : end] == array.tobytes()
        return {}

    memory = SharedMemory("system")
    perform(memory.send(Infer("sam3_interactive", arrays, ()), Retries(0)), FakeTransport(reading))
    perform_with_fake_server(memory.close(), answering(None))
    assert len(mapped) == 1
