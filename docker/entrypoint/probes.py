"""Whether the server does its work: asked with an inference, because readiness can lie.

Triton says "ready" with a dead Python stub behind it, and a server that is merely busy must not
be restarted for it. So each probe sends a canary: one click in a black image, through every model.
Where none comes back in time, or the queue is full, it looks at whether encoder and decoder
finish other requests meanwhile:

                 canary answered right   busy: they finish others   else
    startup      pass                    fail                       fail
    live         pass                    pass                       fail
    ready        pass                    pass                       fail
                 (never while draining, nor when Triton itself says it is not ready)
"""

import http.client
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from server.errors import StartError
from server.health import ENSEMBLE, Probe, canary_request, check_canary

WORKERS = ("sam3_image_encoder", "sam3_prompt_decoder")
"""The models that every request about a new image passes."""

FILE_ENSEMBLE = "sam3_interactive_file"
"""Where it is served its canary is the one to send: it passes the reader and the writer as well."""

BLACK_PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAADElEQVR4nGNgoA4AAABIAAEuuDx+AAAAAElFTkSuQmCC"
)
"""8×8 pixels, in base64, as the file ensemble takes it too."""

RETRY_SECONDS = 0.5
ERRORS_TO_FAIL = 3
"""Errors of the canary in a row: one may be chance, and a dead process never answers otherwise."""
_SUCCESSES = re.compile(r'^nv_inference_request_success\{.*?model="([^"]+)".*?\} (\S+)$', re.M)


class ProbeFailed(Exception):
    """The probe's answer is no; the message says why."""


class _Unanswered(Exception):
    """The canary got no result. `busy`: in vain so far, and a working server may do that."""

    def __init__(self, reason: str, *, busy: bool = False) -> None:
        super().__init__(reason)
        self.busy = busy


@dataclass(frozen=True)
class Target:
    """The server to probe, and the file that says it is being drained."""

    host: str
    http_port: int
    metrics_port: int
    drain_mark: Path


def startup(target: Target, timeout: float) -> str:
    """Pass once a canary was answered; `timeout` in seconds. Raises ProbeFailed."""
    try:
        _canary(target, timeout)
    except _Unanswered as error:
        raise ProbeFailed(str(error)) from error
    return "the canary was answered"


def live(target: Target, timeout: float) -> str:
    """Pass while the server answers the canary, or others, within `timeout` s. Raises ProbeFailed.

    A wrong answer and a closed port fail at once, errors after three, no answer only at the end of
    `timeout`.
    """
    deadline = time.monotonic() + timeout
    before = _finished(target, timeout)
    failure: _Unanswered | None = None
    errors = 0
    while True:
        try:
            _canary(target, deadline - time.monotonic())
            return "the canary was answered"
        except _Unanswered as error:
            errors = 0 if error.busy else errors + 1
            # The last attempt has little time left: that it was in vain says less than an error.
            if failure is None or failure.busy:
                failure = error
        if errors == ERRORS_TO_FAIL or time.monotonic() + RETRY_SECONDS >= deadline:
            break
        time.sleep(RETRY_SECONDS)
    if not failure.busy:
        raise ProbeFailed(str(failure))
    now = _finished(target, timeout)
    idle = [model for model in WORKERS if now.get(model, 0) <= before.get(model, 0)]
    if idle:
        raise ProbeFailed(f"{failure}; {' and '.join(idle)} finished nothing meanwhile")
    return f"busy: {failure}, but encoder and decoder finish other requests"


def ready(target: Target, timeout: float) -> str:
    """Pass while the server should be sent requests. Raises ProbeFailed."""
    if target.drain_mark.exists():
        raise ProbeFailed("draining: it takes no new requests")
    answer = live(target, timeout)  # first: it names the model that died
    status = _readiness(target, timeout)
    if status != http.client.OK:
        raise ProbeFailed(f"Triton says it is not ready ({status})")
    return answer


def loaded(target: Target, timeout: float) -> bool:
    """Whether every model was loaded: it may be ended from now on if it is sick.

    Triton opens its port then, and not before. What it says there is no matter: from 26.04 on it is
    not ready once a model has died.
    """
    try:
        _readiness(target, timeout)
    except ProbeFailed:
        return False
    return True


def _readiness(target: Target, timeout: float) -> int:
    """The status with which Triton says whether it is ready. Raises ProbeFailed without one."""
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
    """Raises _Unanswered, or ProbeFailed where waiting will not help."""
    name, inference = _canary_of_served_ensemble(target, timeout)
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


def _canary_of_served_ensemble(target: Target, timeout: float) -> tuple[str, tuple[bytes, bytes]]:
    """The ensemble's name; the JSON header and binary part of its canary."""
    for name in (FILE_ENSEMBLE, ENSEMBLE):
        path = f"/v2/models/{name}/config"
        status, config = _request(target, target.http_port, path, timeout)
        if status == http.client.OK:
            made = file_canary() if name == FILE_ENSEMBLE else canary_request(json.loads(config))
            return name, made
    raise _Unanswered(f"{ENSEMBLE} is not served ({status})")


def file_canary() -> tuple[bytes, bytes]:
    """One click in the middle of a black picture."""
    header = {
        "inputs": [
            {"name": "encoded_image", "datatype": "BYTES", "shape": [1, 1], "data": [BLACK_PNG]},
            {"name": "points", "datatype": "FP32", "shape": [1, 1, 1, 2], "data": [4.0, 4.0]},
            {"name": "point_labels", "datatype": "INT32", "shape": [1, 1, 1], "data": [1]},
        ],
        "outputs": [{"name": "scores"}],
    }
    return json.dumps(header).encode(), b""


def _finished(target: Target, timeout: float) -> dict[str, float]:
    """How many requests each model has finished since it was loaded."""
    try:
        status, text = _request(target, target.metrics_port, "/metrics", timeout)
    except _Unanswered as error:
        raise ProbeFailed(f"no metrics: {error}") from error
    if status != http.client.OK:
        raise ProbeFailed(f"no metrics: status {status}")
    return {model: float(count) for model, count in _SUCCESSES.findall(text.decode())}


def _request(
    target: Target,
    port: int,
    path: str,
    timeout: float,
    inference: tuple[bytes, bytes] | None = None,
) -> tuple[int, bytes]:
    """Raises ProbeFailed where nobody listens, _Unanswered where no answer came in time."""
    try:
        return Probe(target.host, port).request(path, max(timeout, 0.001), inference)
    except ConnectionRefusedError as error:
        raise ProbeFailed(f"nobody listens on port {port}") from error
    except OSError as error:
        reason = f"no answer from {path} ({type(error).__name__})"
        raise _Unanswered(reason, busy=isinstance(error, TimeoutError)) from error
