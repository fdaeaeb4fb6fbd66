"""The blocking client against the real server, over gRPC and HTTP."""

import dataclasses
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from server import TritonServer
from tests.client import misbehaving
from tests.client.statistics import decodings, encodings
from tests.client.test_shared_memory import regions
from triton_sam3 import (
    Client,
    ClientUnusable,
    ImageError,
    InvalidRequest,
    Prompt,
    PromptError,
    Segmentation,
    ServerError,
)

Pixels = NDArray[np.uint8]
Fresh = Callable[[], Pixels]
POINTS = [(110, 80)]
BOXES = [(95, 60, 140, 110), (10, 20, 70, 80)]


def same(one: Segmentation, other: Segmentation) -> None:
    np.testing.assert_array_equal(one.masks, other.masks)
    np.testing.assert_array_equal(one.logits, other.logits)
    np.testing.assert_array_equal(one.scores, other.scores)


@pytest.mark.semantic(
    "client", "boxes come first, then the object of the points", "the block's rules"
)
def test_masks_of_boxes_come_before_the_mask_of_the_points(url: str, coins: Pixels) -> None:
    with Client(url) as client:
        both = client.segment(coins, points=POINTS, boxes=BOXES, threshold=-1)
        points = client.segment(coins, points=POINTS, threshold=-1)
    assert both.masks.shape == (3, *coins.shape[:2])
    assert both.class_ids.tolist() == [-1, -1, -1]
    np.testing.assert_allclose(both[2].logits, points[0].logits, atol=2e-2)


@pytest.mark.semantic("client", "HTTP and gRPC give the same", "equality")
def test_both_protocols_give_the_same_result(server: TritonServer, coins: Pixels) -> None:
    with Client(server.grpc_url) as one, Client(server.http_url) as other:
        for multimask_output in (True, False):
            same(
                one.segment(coins, POINTS, BOXES, multimask_output=multimask_output),
                other.segment(coins, POINTS, BOXES, multimask_output=multimask_output),
            )


def test_an_image_may_be_a_path_a_pil_image_or_an_array(
    url: str, coins: Pixels, tmp_path: Path
) -> None:
    path = tmp_path / "coins.png"
    Image.fromarray(coins).save(path)
    with Client(url) as client:
        result = client.segment(coins, POINTS)
        for image in (path, str(path), Image.fromarray(coins)):
            same(client.segment(image, POINTS), result)


@pytest.mark.semantic("client", "the same image twice is encoded once", "Triton's own counters")
def test_a_known_image_is_not_encoded_again(url: str, fresh: Fresh, server: TritonServer) -> None:
    image = fresh()
    with Client(url) as client:
        before = encodings(server)
        first = client.segment(image, POINTS)
        assert encodings(server) == before + 1
        same(client.segment(image.copy(), POINTS), first)
        client.segment(image, boxes=BOXES)
        assert encodings(server) == before + 1
        client.segment(fresh(), POINTS)
        assert encodings(server) == before + 2


@pytest.mark.semantic(
    "client", "with that turned off the same image is encoded each time", "Triton's own counters"
)
def test_remembering_images_can_be_turned_off(url: str, fresh: Fresh, server: TritonServer) -> None:
    image = fresh()
    with Client(url, remember_images=0) as client:
        before = encodings(server)
        same(client.segment(image, POINTS), client.segment(image, POINTS))
        assert encodings(server) == before + 2


def test_the_number_of_remembered_images_is_limited(
    url: str, fresh: Fresh, server: TritonServer
) -> None:
    images = [fresh() for _ in range(3)]
    with Client(url, remember_images=2) as client:
        for image in images:
            client.segment(image, POINTS)
        before = encodings(server)
        client.segment(images[2], POINTS)
        client.segment(images[1], POINTS)
        assert encodings(server) == before
        client.segment(images[0], POINTS)
        assert encodings(server) == before + 1


def test_threads_with_the_same_new_image_encode_it_once(
    url: str, fresh: Fresh, server: TritonServer
) -> None:
    image = fresh()
    with Client(url) as client, ThreadPoolExecutor(8) as pool:
        before = encodings(server)
        results = list(pool.map(lambda _: client.segment(image, POINTS), range(8)))
        assert encodings(server) == before + 1
    for result in results:
        np.testing.assert_allclose(result.logits, results[0].logits, atol=2e-2)


@pytest.mark.semantic(
    "client",
    "more prompts than the server takes are split, over one encoding",
    "Triton's own counters",
)
def test_more_prompts_than_a_request_takes_are_split(fresh: Fresh, server: TritonServer) -> None:
    image = fresh()
    with Client(server.grpc_url, remember_images=0) as client:
        served = client.status().served
        assert served is not None
        prompts = [Prompt(box=(x, x, x + 40, x + 40)) for x in (10, 60, 110)]
        few = client.segment(image, prompts=prompts, threshold=-1)
        many = served.max_objects // len(prompts) + 1
        counts = encodings(server), decodings(server)
        result = client.segment(image, prompts=prompts * many, threshold=-1)
    assert (encodings(server), decodings(server)) == (counts[0] + 1, counts[1] + 2)
    assert len(result) == many * len(prompts) > served.max_objects
    for start in (0, len(result) - len(prompts)):
        np.testing.assert_allclose(result.logits[start : start + 3], few.logits, atol=2e-2)


@pytest.mark.semantic("client", "masks under the threshold are dropped", "the block's rules")
def test_masks_below_the_threshold_are_dropped(url: str, coins: Pixels) -> None:
    with Client(url) as client:
        every = client.segment(coins, boxes=BOXES, threshold=-1)
        middle = float(every.scores.mean())
        kept = client.segment(coins, boxes=BOXES, threshold=middle)
        assert len(every) == 2
        np.testing.assert_array_equal(kept.scores, every.scores[every.scores >= middle])
        assert len(client.segment(coins, boxes=BOXES, threshold=2)) == 0


@pytest.mark.semantic(
    "client", "boxes given but empty are an empty result without a call", "the block's rules"
)
def test_empty_boxes_give_an_empty_result_without_a_request(coins: Pixels) -> None:
    with Client("grpc://127.0.0.1:1") as client:
        result = client.segment(coins, boxes=np.empty((0, 4)))
    assert len(result) == 0
    assert result.masks.shape == (0, *coins.shape[:2])


@pytest.mark.semantic(
    "client", "neither points nor boxes is an error that says so", "the block's rules"
)
def test_missing_prompts_are_rejected_without_a_request(coins: Pixels) -> None:
    with Client("grpc://127.0.0.1:1") as client:
        with pytest.raises(PromptError, match="nothing to segment"):
            client.segment(coins)
        with pytest.raises(ImageError, match="no file"):
            client.segment("nowhere.jpg", POINTS)


@pytest.mark.semantic("client", "classes are carried to the masks", "the block's rules")
def test_classes_are_carried_to_the_masks(url: str, coins: Pixels) -> None:
    corners = dict(zip(("x_min", "y_min", "x_max", "y_max"), BOXES[0], strict=True))
    box = {**corners, "class_name": "coin", "class_id": 7, "detection_id": "first"}
    with Client(url) as client:
        result = client.segment(coins, boxes=[box], threshold=-1)
    assert (result.class_names, result.detection_ids) == (("coin",), ("first",))
    assert result.class_ids.tolist() == [7]


@pytest.mark.semantic("client", "points, a box and a mask can make one object", "the contract")
def test_one_prompt_can_have_a_box_points_and_a_mask(url: str, coins: Pixels) -> None:
    with Client(url) as client:
        rough = client.segment(coins, POINTS, threshold=-1)
        prompts = [
            Prompt(points=POINTS, box=BOXES[0], mask=rough.logits[0], class_name="coin"),
            Prompt(box=BOXES[1]),
            Prompt(mask=rough.logits[0]),
        ]
        together = client.segment(coins, prompts=prompts, threshold=-1)
        assert together.class_names == ("coin", "foreground", "foreground")
        for prompt, mask in zip(prompts, together, strict=True):
            alone = client.segment(coins, prompts=prompt, threshold=-1)
            np.testing.assert_allclose(mask.logits, alone.logits[0], atol=2e-2)


def test_an_error_of_the_server_keeps_its_message(url: str, coins: Pixels) -> None:
    with Client(url) as client:
        served = client.status().served
        assert served is not None
        too_many = [(5, 5)] * (served.max_tokens + 1)
        with pytest.raises(PromptError, match=f"at most {served.max_tokens}"):
            client.segment(coins, points=too_many)
        client._engine._served = dataclasses.replace(served, max_tokens=2 * served.max_tokens)
        with pytest.raises(InvalidRequest, match=str(served.max_tokens)):
            client.segment(coins, points=too_many)
        assert len(client.segment(coins, points=POINTS, threshold=-1)) == 1


@pytest.mark.parametrize("answer", [b"# HELP", b"[]", b"null", b"{}", b'{"config": {}}'])
def test_a_server_that_is_not_triton_is_a_sam3_error(coins: Pixels, answer: bytes) -> None:
    with misbehaving.http((200, answer)) as (url, _), Client(url) as client:
        with pytest.raises(ServerError):
            client.segment(coins, POINTS)
        with pytest.raises(ServerError):
            client.status()


def test_multimask_output_may_be_a_boolean_of_any_type(url: str, coins: Pixels) -> None:
    values: list[Any] = [False, 0, np.False_, True, 1, np.True_]
    with Client(url) as client:
        single, *others = (
            client.segment(coins, POINTS, multimask_output=value, threshold=-1) for value in values
        )
    for result in others[:2]:
        np.testing.assert_allclose(result.logits, single.logits, atol=2e-2)
    for result in others[3:]:
        np.testing.assert_allclose(result.logits, others[2].logits, atol=2e-2)


def test_a_closed_client_raises_client_unusable(url: str, coins: Pixels) -> None:
    client = Client(url)
    client.segment(coins, POINTS)
    client.close()
    client.close()
    with pytest.raises(ClientUnusable, match="is closed"):
        client.segment(coins, POINTS)


def test_closing_ends_the_clients_threads(server: TritonServer, coins: Pixels) -> None:
    before = threading.active_count()
    for _ in range(3):
        with Client(server.http_url) as client:
            client.segment(coins, POINTS)
        Client(server.http_url).segment(coins, POINTS)  # dropped, not closed
    assert threading.active_count() == before


@pytest.mark.parametrize("shared_memory", [None, "system"])
def test_a_client_garbage_collected_on_its_own_thread_is_closed(
    server: TritonServer, coins: Pixels, shared_memory: Literal["system"] | None
) -> None:
    client = Client(server.http_url, shared_memory=shared_memory)
    client.segment(coins, POINTS)
    transport: Any = client._transport
    gc.disable()  # not on another thread before
    try:
        cycle: list[Any] = [client]
        cycle.append(cycle)
        del client, cycle
        transport._loop.call_soon_threadsafe(gc.collect)
        transport._thread.join(30)
    finally:
        gc.enable()
    assert not transport._thread.is_alive()
    assert regions(server) == []


@pytest.mark.parametrize("shared_memory", [None, "system"])
def test_closing_ends_the_calls_in_flight_in_other_threads(
    url: str, server: TritonServer, coins: Pixels, shared_memory: Literal["system"] | None
) -> None:
    ended: list[BaseException] = []

    def segment_on(client: Client) -> None:
        try:
            while True:
                client.segment(coins, POINTS)
        except BaseException as error:
            ended.append(error)

    for pause in (0.0, 0.02, 0.05, 0.1, 0.2, 0.4):
        client = Client(url, shared_memory=shared_memory, remember_images=0)
        threads = [
            threading.Thread(target=segment_on, args=(client,), daemon=True) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        time.sleep(pause)
        client.close()
        for thread in threads:
            thread.join(30)
    assert len(ended) == 24
    assert {type(error) for error in ended} == {ClientUnusable}
    assert all("is closed" in str(error) for error in ended)
    assert regions(server) == []


# Python 3.12 and newer warn of every fork beside threads; what it can do is what these are about.
FORKS = (sys.executable, "-W", "ignore:This process:DeprecationWarning", "-c")
FORKED = """
import os
import cv2
import triton_sam3
cv2.setNumThreads(3)
def threads():
    read, write = os.pipe()
    if not os.fork():
        os.write(write, bytes([cv2.getNumThreads()]))
        os._exit(0)
    return os.read(read, 1)[0]
before = threads()
triton_sam3.Client({url!r}).close()
print(before, threads(), cv2.getNumThreads())
"""


@pytest.mark.parametrize("url", ["grpc://127.0.0.1:9", "http://127.0.0.1:9"])
def test_a_forked_child_does_not_wait_for_opencv_threads_of_its_parent(url: str) -> None:
    """One of them may hold a lock at the fork, which nobody would ever give back."""
    script = FORKED.format(url=url)
    done = subprocess.run([*FORKS, script], capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout.split(), done.stderr) == (["3", "1", "3"], "")


FORKING = """
import os, signal, sys
import numpy as np
from triton_sam3 import Client, ClientUnusable
signal.alarm(90)
image = np.zeros((50, 60, 3), np.uint8)
client = Client({url!r}, shared_memory={shared_memory!r})
client.segment(image, points=[(5, 5)])
for number, leave in enumerate(("client.close()", "del client", "pass"), 1):
    child = os.fork()
    if not child:
        signal.alarm(30)
        try:
            client.segment(image, points=[(5, 5)])
        except ClientUnusable as error:
            print(error, flush=True)
        exec(leave)
        with Client({url!r}, shared_memory={shared_memory!r}) as own:
            own.segment(image, points=[(5, 5)])
        sys.exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7, leave
    client.segment(image + number, points=[(5, 5)])
client.close()
"""


@pytest.mark.parametrize("shared_memory", [None, "system"])
def test_a_forked_child_cannot_use_or_harm_the_parents_client(
    url: str, shared_memory: str | None
) -> None:
    """Whether it closes its parent's client, drops it or ends with it."""
    script = FORKING.format(url=url, shared_memory=shared_memory)
    done = subprocess.run(
        [*FORKS, script], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    message = f"this client of {url} was created before a fork; create one in each"
    assert [line[: len(message)] for line in done.stdout.splitlines()] == [message] * 3
