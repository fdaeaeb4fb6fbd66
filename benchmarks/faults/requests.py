"""External faults: callers, connections, proxies."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import cycle

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as triton_grpc
from tritonclient.utils import InferenceServerException

from benchmarks.decoding import METRICS_TIMEOUT
from benchmarks.faults.bench import Bench
from benchmarks.faults.load import Caller, Kind, Outcome, Question, answered_questions, observe
from benchmarks.faults.relay import AT_ONCE, Relay
from benchmarks.faults.stand import Stand
from benchmarks.faults.trial import Result, Trial
from benchmarks.wire import Wire, tensor
from server.health import ENSEMBLE, canary_request
from triton_sam3 import Client, SAM3Error, ServerUnreachable
from triton_sam3.contract import DECODER
from triton_sam3.status import store_metrics

SECONDS = 6.0
"""How long a fault lasts."""
MIN_CALM, CALM_REQUESTS, TIMES = 0.7, 4.0, 5
OPENERS = 12
VIEWS, VIEWS_SECONDS = 10_000, 450.0
"""How many views are never closed, and the time limit for opening them; the other faults take five
of the suite's fifteen minutes."""
REFUSED = ("StatusCode.INVALID_ARGUMENT", "StatusCode.NOT_FOUND")


def client_gone(bench: Bench, title: str) -> Result:
    """Callers disconnect in the middle of a request, during the answer, or while waiting."""
    stand = bench.stand()
    left = 0

    def leave_for_a_while() -> None:
        nonlocal left
        request = _raw_request(stand)
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            for part in (len(request) // 2, len(request)):
                _leave(stand, request[:part])
            _hang_up(stand, bench.questions(stand)[0])
            left += 3

    with Trial(title, stand, bench.questions(stand)) as trial:
        trial.inject(leave_for_a_while)
        trial.recover()
    trial.remark = f"{left} callers left"
    return trial.result()


def _raw_request(stand: Stand) -> bytes:
    """The bytes of an HTTP request."""
    _, config = stand.container.call(f"/v2/models/{ENSEMBLE}/config")
    header, pixels = canary_request(json.loads(config))
    lines = (
        f"POST /v2/models/{ENSEMBLE}/infer HTTP/1.1",
        "Host: localhost",
        f"Inference-Header-Content-Length: {len(header)}",
        f"Content-Length: {len(header) + len(pixels)}",
    )
    return "\r\n".join((*lines, "", "")).encode() + header + pixels


def _leave(stand: Stand, request: bytes) -> None:
    with socket.create_connection(("127.0.0.1", stand.container.http_port), 5) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
        connection.sendall(request)


def _hang_up(stand: Stand, question: Question) -> None:
    with Client(stand.grpc, timeout=0.02, retries=0, remember_images=0) as client:
        try:
            question.ask(client)
        except SAM3Error:
            return


def connections_reset(bench: Bench, title: str) -> Result:
    """Every connection is reset, again and again; the client must hide it."""

    def reset(http: Relay, grpc: Relay, calm: float) -> None:
        for relay in (http, grpc):
            relay.reset_all()
        time.sleep(calm)

    return _through_relays(bench, title, reset, lambda r: f"{sum(x.cut for x in r)} resets")


def bad_gateway(bench: Bench, title: str) -> Result:
    """A proxy has no server for a moment, again and again; the client must hide it."""

    def refuse(http: Relay, grpc: Relay, calm: float) -> None:
        for refusing, seconds in ((True, 0.3), (False, calm)):
            for relay in (http, grpc):
                relay.refuse(refusing)
            time.sleep(seconds)

    return _through_relays(bench, title, refuse, lambda r: f"{sum(x.refused for x in r)} × 502")


def _through_relays(
    bench: Bench,
    title: str,
    harm: Callable[[Relay, Relay, float], None],
    remark: Callable[[tuple[Relay, Relay]], str],
) -> Result:
    """Repeat `harm`, which is passed the seconds to wait so that a few requests fit in between."""
    stand = bench.stand()
    with Relay(stand.container.http_port) as http, Relay(stand.container.grpc_port) as grpc:
        callers = [
            Caller(f"http://127.0.0.1:{http.port}", {"remember_images": 0}),
            Caller(f"grpc://127.0.0.1:{grpc.port}"),
        ]
        hidden = (ServerUnreachable,)
        with Trial(title, stand, bench.questions(stand), callers=callers, hidden=hidden) as trial:

            def harm_for_a_while() -> None:
                took = [one.ended - one.began for one in trial.load.outcomes]
                calm = max(MIN_CALM, CALM_REQUESTS * float(np.median(took)))
                until = time.monotonic() + max(SECONDS, TIMES * calm)
                while time.monotonic() < until:
                    harm(http, grpc, calm)

            trial.inject(harm_for_a_while)
            trial.recover()
        trial.remark = remark((http, grpc))
    return trial.result()


Inputs = dict[str, npt.NDArray[np.generic]]


def poisons(image: npt.NDArray[np.uint8]) -> list[tuple[str, Inputs]]:
    """Requests that violate the wire contract: a model and its inputs, batch dimension first.

    image: [S, S, 3]
    """

    def request(points: object, labels: object, **others: npt.NDArray[np.generic]) -> Inputs:
        return {
            "image": image[None],
            "point_coords": np.array([points], np.float32),
            "point_labels": np.array([labels], np.int32),
            **others,
        }

    point, positive = [[[0.5, 0.5]]], [[1]]
    nobody = np.array([[b"nobody-was-given-this-id"]], np.object_)
    by_id = request(point, positive, image_id=nobody)
    del by_id["image"]
    wild = np.full((1, 1, len(image) * 4 // 14, len(image) * 4 // 14), np.inf, np.float16)
    return [
        (ENSEMBLE, request(point, [[7]])),
        (ENSEMBLE, request([[[np.nan, 0.5]]], positive)),
        (ENSEMBLE, request(point, [[1], [1]])),
        (ENSEMBLE, request(point, [[-1]])),
        (ENSEMBLE, request([point[0]] * 300, [positive[0]] * 300)),
        (ENSEMBLE, request(point, positive, mask_input=wild)),
        (DECODER, by_id),
    ]


def poisoned(bench: Bench, title: str) -> Result:
    """Send bad requests together with good ones, so that they are merged into one batch."""
    stand = bench.stand()
    with Trial(title, stand, bench.questions(stand)) as trial:
        with closing(Wire(stand.grpc)) as wire:
            shape = (wire.side, wire.side, 3)
        pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)

        def send(share: int) -> None:
            until = time.monotonic() + SECONDS
            with triton_grpc.InferenceServerClient(stand.grpc.split("//")[1]) as client:
                for number, (model, inputs) in enumerate(cycle(poisons(pixels))):
                    if time.monotonic() > until:
                        return
                    if number % 2 == share:
                        trial.others.append(_poison(client, model, inputs))

        def send_all() -> None:
            with ThreadPoolExecutor(2) as threads:
                list(threads.map(send, range(2)))

        trial.inject(send_all)
        trial.recover()
    refused = sum(one.kind is Kind.CLEAR for one in trial.others)
    trial.remark = f"{refused} of {len(trial.others)} poisoned rejected with a message"
    return trial.result()


def _poison(client: triton_grpc.InferenceServerClient, model: str, inputs: Inputs) -> Outcome:
    """A refusal that says why is right; an answer is wrong."""
    tensors = [tensor(name, array) for name, array in inputs.items()]
    began = time.monotonic()
    try:
        client.infer(model, tensors, client_timeout=10)
        kind, said = Kind.WRONG, "a poisoned request was answered"
    except InferenceServerException as error:
        said = f"{error.status()}: {error.message()}"
        kind = Kind.CLEAR if error.status() in REFUSED else Kind.WRONG
    return Outcome(began, time.monotonic(), kind, said)


def kept_limit(bench: Bench, title: str) -> Result:
    """Room for 8 images, and callers that return to 24: most have to be sent again."""
    repository, bound = bench.copy_keeping(8)
    with Stand(repository, bench.folder()) as stand:
        with Client(stand.grpc) as client:
            questions = answered_questions(client, 24)
        kept: list[int] = []
        callers = [Caller(stand.grpc), Caller(stand.http), Caller(stand.grpc)]
        with Trial(title, stand, questions, callers=callers) as trial:
            trial.inject(lambda: _sample(stand, kept, 2 * SECONDS))
            trial.recover()
        trial.remark = describe_kept(kept, bound)
        return trial.result()


def views_never_closed(bench: Bench, title: str) -> Result:
    """Each view keeps an image; the bound evicts them, and memory's slope is measured once full."""
    full = 256
    repository, bound = bench.copy_keeping(full)
    with Stand(repository, bench.folder()) as stand:
        questions = bench.questions(stand)
        # Without a pause it got two answers in three, and too few views were opened.
        onlooker = Caller(stand.grpc, pause=0.2)
        with Trial(title, stand, questions, callers=[onlooker], timeout=30.0) as trial:
            until = time.monotonic() + VIEWS_SECONDS
            _open_all(stand, questions, 2 * full, until, trial)
            trial.forget_sizes()
            rest = VIEWS - _opened(trial)
            trial.inject(lambda: _open_all(stand, questions, rest, until, trial))
            trial.recover()
            kept: list[int] = []
            _sample(stand, kept, 2.0)
        opened = (
            f"{_opened(trial):,} of {VIEWS:,} opened in the time limit, a mask requested for one "
            "in ten"
        )
        trial.remark = f"{opened}; {describe_kept(kept, bound)}"
        return trial.result()


def _opened(trial: Trial) -> int:
    return len(trial.others) + len(trial.unasked)


def _open_all(
    stand: Stand, questions: list[Question], count: int, until: float, trial: Trial
) -> None:
    """Open `count` views, and check that every tenth shows the right mask."""
    local = threading.local()
    clients: list[Client] = []

    def open_one(number: int) -> None:
        if time.monotonic() > until:
            return
        if not hasattr(local, "client"):
            local.client = Client(stand.grpc, timeout=30.0, remember_images=0)
            clients.append(local.client)
        question = questions[number % len(questions)]
        mask = question.mask
        assert mask is not None

        def show() -> npt.NDArray[np.bool_]:
            view = local.client.open(question.image)
            if number % 10:
                return mask
            shown: npt.NDArray[np.bool_] = view.segment(points=[question.point]).masks
            return shown

        (trial.unasked if number % 10 else trial.others).append(observe(show, mask, 30.0))

    with ThreadPoolExecutor(OPENERS) as threads:
        list(threads.map(open_one, range(count)))
    for client in clients:
        client.close()


def _sample(stand: Stand, kept: list[int], seconds: float) -> None:
    """Sample the bytes that the decoder reports as kept."""
    url = f"http://127.0.0.1:{stand.container.metrics_port}/metrics"
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        reported = store_metrics(url, METRICS_TIMEOUT).get("sam3_kept_images_bytes")
        if reported is not None:
            kept.append(int(reported))
        time.sleep(0.2)


def describe_kept(kept: Sequence[int], bound: int) -> str:
    """Describe the samples. Raises RuntimeError if one exceeds the bound, or none has an image."""
    most = max(kept, default=0)
    if most > bound:
        raise RuntimeError(f"{most:,} bytes of images kept, but the bound is {bound:,}")
    if most == 0:
        raise RuntimeError("no sample shows a kept image: the bound was never tested")
    return f"at most {most:,} of {bound:,} bytes kept"
