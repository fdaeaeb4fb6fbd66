"""Where each millisecond of a request goes, from the caller's call to the returned mask.

The client's own spans and Triton's trace share one clock (CLOCK_MONOTONIC), so they fit on one
timeline:

    call ── prepare ─┬─ wire ─┬─ per model: queue · input · compute · output ─┬─ wire ─┬─ finish
                  client    server                                         server    client
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from server import TritonServer
from triton_sam3 import Client
from triton_sam3.flow import Call, Infer
from triton_sam3.transports import Transport

TRACE_SUFFIX = "trace"
MODEL_PHASES = (
    ("queue", "QUEUE_START"),
    ("input to the model", "COMPUTE_START"),
    ("compute", "COMPUTE_INPUT_END"),
    ("output from the model", "COMPUTE_OUTPUT_START"),
)
"""The phases of a request in a model, and Triton's name for the timestamp at which each begins."""


@dataclass(frozen=True)
class Phase:
    """One phase of a request: where it ran, what was done, and its median duration."""

    where: str
    what: str
    milliseconds: float


@dataclass(frozen=True)
class Anatomy:
    """The phases of one kind of request, in order."""

    title: str
    milliseconds: float
    """Median of whole requests, which is not the sum of the phases' medians."""
    phases: tuple[Phase, ...]

    def table(self) -> Table:
        table = Table("where", "what", "ms", title=f"{self.title}: {self.milliseconds:.1f} ms")
        for phase in self.phases:
            table.add_row(phase.where, phase.what, f"{phase.milliseconds:.2f}")
        return table

    @property
    def largest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.milliseconds)


class TimedTransport:
    """Records when each inference was sent and answered, in nanoseconds of CLOCK_MONOTONIC."""

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self.inferences: list[tuple[int, int]] = []

    def call(self, call: Call) -> Any:
        started = time.monotonic_ns()
        answer = self._inner.call(call)
        if isinstance(call.request, Infer):
            self.inferences.append((started, time.monotonic_ns()))
        return answer

    def close(self) -> None:
        self._inner.close()


def tracing(folder: Path) -> tuple[str, ...]:
    """Arguments that make tritonserver write each request's timestamps to a separate file."""
    settings = (
        *("level=TIMESTAMPS", "rate=1", "count=-1"),
        # Without a frequency it would write at shutdown, and be killed before it could.
        *(f"triton,file={folder / TRACE_SUFFIX}", "triton,log-frequency=1"),
    )
    return tuple(word for setting in settings for word in ("--trace-config", setting))


def dissect(
    repository: Path, photo: Any, place: tuple[float, float], folder: Path
) -> list[Anatomy]:
    """Trace clicks and one-shot requests on a dedicated server; `folder` must be empty."""
    with (
        TritonServer(repository, extra_args=tracing(folder)) as server,
        Client(server.grpc_url, timeout=600, remember_images=0) as client,
    ):
        transport = client._transport = TimedTransport(client._transport)
        view = client.open(photo)
        _wait_until_still(folder)

        def record(request: Callable[[], object], count: int, title: str) -> Anatomy:
            return summarise(title, [_record(transport, folder, request) for _ in range(count)])

        return [
            record(lambda: view.segment(points=[place]), 25, "a click on a kept image"),
            record(lambda: client.segment(photo, points=[place]), 10, "a one-shot request"),
        ]


Moments = dict[str, dict[str, int]]
"""Triton's timestamps in nanoseconds, by model and then by name."""


@dataclass(frozen=True)
class Recording:
    """One request: the client's four timestamps, and the server's."""

    called: int
    sent: int
    received: int
    returned: int
    server: Moments

    def phases(self) -> list[tuple[str, str, int]]:
        """Where, what, and how many nanoseconds, in order; together they are the whole request."""
        edge = self.server[""]
        served = [(name, moments) for name, moments in self.server.items() if name]
        served.sort(key=lambda item: item[1]["QUEUE_START"])
        starts = [
            ("client", "prepare the request", self.called),
            ("wire", "request to the server", self.sent),
            ("server", "route and read the request", edge["GRPC_WAITREAD_END"]),
        ]
        for number, (model, moments) in enumerate(served):
            if number:
                # COMPUTE_END is recorded after the outputs have been passed to the next model.
                ended = min(served[number - 1][1]["COMPUTE_END"], moments["QUEUE_START"])
                starts.append(("server", "between the models", ended))
            starts += [(model, what, moments[name]) for what, name in MODEL_PHASES]
        starts += [
            ("wire", "answer to the client", edge["GRPC_SEND_START"]),
            ("client", "finish the masks", self.received),
        ]
        ends = [*(start for *_, start in starts[1:]), self.returned]
        return [
            (where, what, end - start)
            for (where, what, start), end in zip(starts, ends, strict=True)
        ]


def _record(transport: TimedTransport, folder: Path, request: Callable[[], object]) -> Recording:
    seen = set(folder.iterdir())
    called = time.monotonic_ns()
    request()
    returned = time.monotonic_ns()
    sent, received = transport.inferences[-1]
    return Recording(called, sent, received, returned, _next_trace(folder, after=seen))


def _wait_until_still(folder: Path) -> None:
    """Wait until the traces of the canary and of opening the view have been written."""
    before: set[Path] = set()
    while (now := set(folder.iterdir())) != before or not now:
        before = now
        time.sleep(0.3)


def _next_trace(folder: Path, after: set[Path]) -> Moments:
    """Read the timestamps in the next file that Triton writes."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for path in sorted(set(folder.iterdir()) - after):
            try:
                return read_trace(json.loads(path.read_text()))
            except json.JSONDecodeError:  # still being written
                continue
        time.sleep(0.005)
    raise TimeoutError(f"Triton wrote no trace to {folder}")


def read_trace(events: Sequence[dict[str, Any]]) -> Moments:
    """Sort one request's trace by model; the endpoint's timestamps go under the empty name."""
    names = {event["id"]: event["model_name"] for event in events if "model_name" in event}
    parents = {event["parent_id"] for event in events if "parent_id" in event}
    moments: Moments = {"": {}}
    for event in events:
        for moment in event.get("timestamps", ()):
            ensemble = event["id"] in parents
            at_edge = ensemble or moment["name"].startswith(("GRPC", "HTTP"))
            model = "" if at_edge else names[event["id"]]
            moments.setdefault(model, {})[moment["name"]] = moment["ns"]
    return moments


def summarise(title: str, recordings: Sequence[Recording]) -> Anatomy:
    """Medians of the whole and of each phase over requests of one kind."""
    every = [recording.phases() for recording in recordings]
    return Anatomy(
        title,
        statistics.median(r.returned - r.called for r in recordings) / 1e6,
        tuple(
            Phase(where, what, statistics.median(phases[i][2] for phases in every) / 1e6)
            for i, (where, what, _) in enumerate(every[0])
        ),
    )
