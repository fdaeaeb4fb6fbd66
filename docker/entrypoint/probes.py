"""Check that the server works, with an inference, because readiness can be wrong.

Triton reports "ready" even when a Python stub is dead, and a server that is merely busy must not
be restarted. So each probe sends a canary: one click in a black image, through every model.
If no answer comes in time, or the queue is full, the probe checks whether every model that has work
to do has finished some of it in the meantime:

                 canary answered right   busy: work is finished     otherwise
    startup      pass                    fail                       fail
    live         pass                    pass                       fail
    ready        pass                    pass                       fail
                 (never while draining, nor when Triton itself reports that it is not ready)
"""

import http.client
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from server.errors import StartError
from server.health import ENSEMBLE, Probe, canary_request, check_canary

FILE_ENSEMBLE = "sam3_interactive_file"
"""If it is served, the canary goes to it: it covers the image reader and mask writer as well."""

READER, WRITER = "sam3_image_reader", "sam3_mask_writer"
WORKERS = (READER, "sam3_image_encoder", "sam3_prompt_decoder", WRITER)
"""The models that the canary passes through, in this order."""

BLACK_PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAADElEQVR4nGNgoA4AAABIAAEuuDx+AAAAAElFTkSuQmCC"
)
"""8×8 pixels in base64, which the file ensemble also accepts."""

RETRY_SECONDS = 0.5
MAX_ERRORS = 3
"""Consecutive canary errors: one may be chance, and a dead process never answers otherwise."""
_SERIES = re.compile(r'^(\w+)\{.*?model="([^"]+)".*?\} (\S+)$', re.M)
_FINISHED = ("nv_inference_request_success", "sam3_masks_written_total")
"""Writing one request's masks can take longer than a probe waits, so each mask is counted too."""
_WAITING = "nv_inference_pending_request_count"


class ProbeFailed(Exception):
    """The probe failed; the message says why."""


class _Unanswered(Exception):
    """The canary got no result. `busy`: it got none yet, which also happens on a working server."""

    def __init__(self, reason: str, *, busy: bool = False) -> None:
        super().__init__(reason)
        self.busy = busy


@dataclass(frozen=True)
class Target:
    """The server to probe, and the file that marks it as draining."""

    host: str
    http_port: int
    metrics_port: int
    drain_mark: Path


@dataclass(frozen=True)
class _Observation:
    """What each model has finished since it was loaded, and how many requests wait for it."""

    finished: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    waiting: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))


def startup(target: Target, timeout: float) -> str:
    """Pass once a canary is answered; `timeout` in seconds. Raises ProbeFailed."""
    try:
        _canary(target, timeout)
    except _Unanswered as error:
        raise ProbeFailed(str(error)) from error
    return "the canary was answered"


def live(target: Target, timeout: float) -> str:
    """Pass if the server answers the canary, or other requests, within `timeout` seconds.

    A wrong answer or a closed port fails at once, errors after three in a row, and no answer only
    when `timeout` has passed. Raises ProbeFailed.
    """
    deadline = time.monotonic() + timeout
    before = _observe(target, timeout)
    failure: _Unanswered | None = None
    errors = 0
    while True:
        try:
            _canary(target, deadline - time.monotonic())
            return "the canary was answered"
        except _Unanswered as error:
            errors = 0 if error.busy else errors + 1
            # The last attempt has little time left: its timing out says less than an error.
            if failure is None or failure.busy:
                failure = error
        if errors == MAX_ERRORS or time.monotonic() + RETRY_SECONDS >= deadline:
            break
        time.sleep(RETRY_SECONDS)
    if errors == MAX_ERRORS:
        raise ProbeFailed(str(failure))
    hung = _hung(before, _observe(target, timeout))
    if hung:
        raise ProbeFailed(f"{failure}; {hung} finished nothing in the meantime")
    return f"busy: {failure}, but every model finishes what it has to do"


def ready(target: Target, timeout: float) -> str:
    """Pass if the server should receive requests. Raises ProbeFailed."""
    if target.drain_mark.exists():
        raise ProbeFailed("draining: no new requests are accepted")
    answer = live(target, timeout)  # first: it names the model that died
    status = _readiness(target, timeout)
    if status != http.client.OK:
        raise ProbeFailed(f"Triton reports that it is not ready ({status})")
    return answer


def loaded(target: Target, timeout: float) -> bool:
    """Whether every model has been loaded: from then on an unhealthy server may be stopped.

    Triton opens its port only then. What it answers there does not matter: from 26.04 on it
    reports that it is not ready once a model has died.
    """
    try:
        _readiness(target, timeout)
    except ProbeFailed:
        return False
    return True


def _readiness(target: Target, timeout: float) -> int:
    """The status of Triton's readiness endpoint. Raises ProbeFailed if there is no answer."""
    try:
        return _request(target, target.http_port, "/v2/health/ready", timeout)[0]
    except _Unanswered as error:
        raise ProbeFailed(str(error)) from error


PROBES: Mapping[str, Callable[[Target, float], str]] = {
    "startup": startup,
    "live": live,
    "ready": ready,
}


def _canary(target: Target, timeout: float) -> None:
    """Send the canary. Raises _Unanswered, or ProbeFailed where waiting will not help."""
    name, inference = _find_canary(target, timeout)
    path = f"/v2/models/{name}/infer"
    status, answer = _request(target, target.http_port, path, timeout, inference)
    if status == http.client.SERVICE_UNAVAILABLE:
        raise _Unanswered(f"the canary was refused: {answer[:200]!r}", busy=True)
    try:
        check_canary(status, answer)
    except StartError as error:
        if status == http.client.OK:
            raise ProbeFailed(str(error)) from error
        raise _Unanswered(str(error)) from error


def _find_canary(target: Target, timeout: float) -> tuple[str, tuple[bytes, bytes]]:
    """The name of the served ensemble, and its canary's JSON header and binary part."""
    for name in (FILE_ENSEMBLE, ENSEMBLE):
        path = f"/v2/models/{name}/config"
        status, config = _request(target, target.http_port, path, timeout)
        if status == http.client.OK:
            canary = file_canary() if name == FILE_ENSEMBLE else canary_request(json.loads(config))
            return name, canary
    raise _Unanswered(f"{ENSEMBLE} is not served ({status})")


def file_canary() -> tuple[bytes, bytes]:
    """A request with one click in the middle of a black image."""
    header = {
        "inputs": [
            {"name": "encoded_image", "datatype": "BYTES", "shape": [1, 1], "data": [BLACK_PNG]},
            {"name": "points", "datatype": "FP32", "shape": [1, 1, 1, 2], "data": [4.0, 4.0]},
            {"name": "point_labels", "datatype": "INT32", "shape": [1, 1, 1], "data": [1]},
        ],
        "outputs": [{"name": "scores"}],
    }
    return json.dumps(header).encode(), b""


def _hung(before: _Observation, now: _Observation) -> str | None:
    """The first model that had work and finished none of it; those after it may just lack work.

    The canary is work for every model but the mask writer, which it reaches only once the decoder
    is free. The mask writer has work if a request waits for it, as all do once its instances hang.
    """
    for model in WORKERS:
        served = model != READER or FILE_ENSEMBLE in now.finished
        has_work = served if model != WRITER else now.waiting[model] > 0
        if has_work and now.finished[model] <= before.finished[model]:
            return model
    return None


def _observe(target: Target, timeout: float) -> _Observation:
    """Read Triton's metrics. Raises ProbeFailed if there are none."""
    try:
        status, text = _request(target, target.metrics_port, "/metrics", timeout)
    except _Unanswered as error:
        raise ProbeFailed(f"no metrics: {error}") from error
    if status != http.client.OK:
        raise ProbeFailed(f"no metrics: status {status}")
    seen = _Observation()
    for name, model, value in _SERIES.findall(text.decode()):
        if name in _FINISHED:
            seen.finished[model] += float(value)
        elif name == _WAITING:
            seen.waiting[model] += float(value)
    return seen


def _request(
    target: Target,
    port: int,
    path: str,
    timeout: float,
    inference: tuple[bytes, bytes] | None = None,
) -> tuple[int, bytes]:
    """Status and body. Raises ProbeFailed if nothing listens, _Unanswered without an answer."""
    try:
        return Probe(target.host, port).request(path, max(timeout, 0.001), inference)
    except ConnectionRefusedError as error:
        raise ProbeFailed(f"nothing listens on {target.host}:{port}") from error
    except OSError as error:
        reason = f"no answer from {path} ({type(error).__name__})"
        raise _Unanswered(reason, busy=isinstance(error, TimeoutError)) from error
