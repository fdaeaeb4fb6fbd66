"""Requests that meet in a queue: whoever waits must not wait for nothing."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from export.repository import read_config
from server import TritonServer
from triton_sam3 import Client

ROOT = Path(__file__).resolve().parents[2]
LOST_WAKE_UP = 0.5
"""Seconds after which Triton's batcher looks into its queue, whether or not it was woken."""
MODELS = sorted(path.parent.name for path in (ROOT / "model_repository").glob("*/config.pbtxt"))


@pytest.mark.parametrize("model", MODELS)
def test_no_queue_has_a_policy(model: str) -> None:
    """With a bound or a timeout Triton does not wake its batcher while the model works."""
    batching = read_config(ROOT / "model_repository", model).dynamic_batching
    assert not batching.HasField("default_queue_policy")
    assert not batching.priority_queue_policy


def test_a_request_that_comes_while_another_is_decoded_is_next(server: TritonServer) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    seconds: list[float] = []

    def ask(pause: float) -> None:
        with Client(server.grpc_url, remember_images=0) as client:
            for _ in range(40):
                time.sleep(pause)
                began = time.monotonic()
                client.segment(image, points=[(20, 20)])
                seconds.append(time.monotonic() - began)

    callers = [threading.Thread(target=ask, args=(pause,)) for pause in (0.0, 0.013)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(seconds) == 80
    # One in five or more where wake-ups are lost; one or two may have waited for a busy machine.
    assert sum(one > LOST_WAKE_UP for one in seconds) <= 3
