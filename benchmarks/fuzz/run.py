"""One run against one server: a warm-up, then four quarters, with a census after each."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings

from benchmarks.fuzz import octets, structured
from benchmarks.fuzz.canary import Canary
from benchmarks.fuzz.census import Census, is_alive
from benchmarks.fuzz.exchange import UNREACHABLE, Answer, Grpc, Http
from benchmarks.fuzz.judge import FINDING, judge
from benchmarks.fuzz.messages import grpc_octets, http_octets
from benchmarks.fuzz.octets import Corpus, Octets
from benchmarks.fuzz.structured import Case
from benchmarks.fuzz.subject import (
    DECODER,
    RLE,
    SIZE,
    Array,
    Subject,
    ask,
    prepare,
    request,
    strings,
)
from benchmarks.fuzz.tally import Finding, Tally
from benchmarks.wire import Wire
from server import TritonServer

WARM_UP = 2_000
"""Requests before memory is measured."""
QUARTERS = 4
CANARY_EVERY = 500
CLICK_EVERY = 8
"""Hypothesis draws runs of similar requests: sixteen images were once kept within 0.4 s, during
which neither half asked about the one that all use, and a store for sixteen evicted it."""
HTTP, GRPC = "HTTP", "gRPC"
LARGEST = ((256, 1), (1, 128))
"""Objects and tokens of the largest requests, which determine the peak memory."""


class ServerDied(Exception):
    """tritonserver is gone."""


@dataclass
class Fuzzer:
    """Sends to one running server and keeps count."""

    server: TritonServer
    tally: Tally = field(default_factory=Tally)
    warm_up: Tally = field(default_factory=Tally)
    """What was counted until the warm-up's end."""

    def __post_init__(self) -> None:
        self._turns = itertools.cycle((HTTP, GRPC))
        self._failure: Exception | None = None
        address = self.server.address
        self._pid = self.server.pid
        self.http = Http(address.reachable_host, address.http_port)
        self.grpc = Grpc(address.reachable_host, address.grpc_port)
        with closing(Wire(self.server.grpc_url)) as wire:
            self.subject: Subject = prepare(self.grpc, wire.side)
        self.canary = Canary(self.grpc, self.subject)
        self._corpus = Corpus.from_subject(self.subject)

    def close(self) -> None:
        self.grpc.close()

    @property
    def findings(self) -> list[Finding]:
        return [*self.warm_up.findings, *self.tally.findings]

    def run(self, requests: int, number: int) -> None:
        """Send half of the requests structured, half as octets, concurrently; then the canary."""
        with ThreadPoolExecutor(2) as threads:
            halves = [
                threads.submit(self.structured, requests // 2, number),
                threads.submit(self.octets, requests - requests // 2, number),
            ]
            for half in halves:
                half.result()
        self.canary.check_again()

    def largest(self) -> None:
        """Send the largest accepted requests, each twice."""
        image_id = strings(self.subject.image_id)
        for objects, tokens in LARGEST * 2:
            points: dict[str, Array] = {
                "point_coords": np.full((1, objects, tokens, 2), 0.5, np.float32),
                "point_labels": np.ones((1, objects, tokens), np.int32),
            }
            ask(self.grpc, request(DECODER, {"image_id": image_id, **points}))
            size = np.array([SIZE], np.int32)
            image: dict[str, Array] = {"image": self.subject.image, "image_size": size}
            ask(self.grpc, request(RLE, {**image, **points}))

    def structured(self, requests: int, number: int) -> None:
        """Send requests drawn by hypothesis; the same number draws the same ones."""
        cases = itertools.count()

        @seed(number)
        @settings(
            max_examples=requests,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(structured.cases(self.subject))
        def send(case: Case) -> None:
            with self._until_one_fails():
                if next(cases) % CLICK_EVERY == 0:
                    self.canary.click()
                self._send_case(case, next(self._turns))

        send()

    def octets(self, requests: int, number: int) -> None:
        """Send mutated octets; the same number mutates the same way."""
        for i in range(requests):
            rng = random.Random(f"{number} {i}")
            protocol, make = ((HTTP, octets.over_http), (GRPC, octets.over_grpc))[i % 2]
            with self._until_one_fails():
                self._send_octets(make(self._corpus, rng), protocol)

    @contextmanager
    def _until_one_fails(self) -> Iterator[None]:
        """After the first failure send nothing more: every later step raises the same error.

        Otherwise the other half would push the requests that led to it out of the recent ones. And
        hypothesis replays the failed case: if the canary was due with it, it no longer is then, and
        the replay would pass and be reported instead of the failure.
        """
        if self._failure:
            raise self._failure
        try:
            yield
        except Exception as error:
            self._failure = self._failure or error
            raise

    def _send_case(self, case: Case, protocol: str) -> None:
        encode: Callable[..., bytes] = http_octets if protocol == HTTP else grpc_octets
        sent = Octets(case.kind, encode(case.request))
        self._send(sent, protocol, case)

    def _send_octets(self, sent: Octets, protocol: str) -> None:
        self._send(sent, protocol, None)

    def _send(self, sent: Octets, protocol: str, case: Case | None) -> None:
        self.tally.sending(sent.kind, protocol, sent.data)
        if protocol == HTTP:
            answer, framed = self.http.send(sent.data), sent.framed
        else:
            answer, framed = self.grpc.send(sent.data, sent.method), True
        self._check_alive(answer)
        verdict = judge(answer, case, framed, self.subject.mask_side, sent.data)
        number = self.tally.count(sent.kind, protocol, verdict, sent.data)
        if number % CANARY_EVERY == 0:
            self.canary.check_again()

    def _check_alive(self, answer: Answer) -> None:
        if answer.code == UNREACHABLE or not is_alive(self._pid):
            raise ServerDied(answer.text)


@dataclass(frozen=True)
class Outcome:
    """The result of one run."""

    requests: int
    warm_up: Tally
    tally: Tally
    """Without the warm-up."""
    marks: list[Census]
    """After the warm-up and after each quarter."""
    iou: float
    """IoU of the canary's mask with the drawn disc."""

    @property
    def findings(self) -> int:
        """How many there were, the warm-up's included."""
        return self.warm_up.total[FINDING] + self.tally.total[FINDING]

    @property
    def kept(self) -> list[Finding]:
        """Those with the octets that reproduce them."""
        return [*self.warm_up.findings, *self.tally.findings]

    @property
    def same_processes(self) -> bool:
        return len({mark.processes for mark in self.marks}) == 1


def fuzz(fuzzer: Fuzzer, requests: int, number: int, progress: Callable[[str], None]) -> Outcome:
    """Warm up, then send the requests. Raises ServerDied and WrongAnswer."""
    progress(f"warm-up: {WARM_UP:,} requests and the largest ones")
    fuzzer.largest()
    fuzzer.run(WARM_UP, -1 - number)
    fuzzer.largest()
    pid = fuzzer.server.pid
    fuzzer.warm_up, fuzzer.tally = fuzzer.tally, Tally()
    marks = [Census.from_pid(pid)]
    for quarter in range(QUARTERS):
        progress(f"quarter {quarter + 1} of {QUARTERS}")
        fuzzer.run(requests // QUARTERS, number * QUARTERS + quarter)
        marks.append(Census.from_pid(pid))
    return Outcome(requests, fuzzer.warm_up, fuzzer.tally, marks, fuzzer.canary.iou)
