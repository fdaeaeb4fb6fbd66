"""More requests than the server can answer: how it refuses, and how long the others wait."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks.faults.bench import Bench
from benchmarks.faults.load import Caller, Kind, Outcome, Question, judge
from benchmarks.faults.stand import Stand
from benchmarks.faults.trial import Result, Trial
from triton_sam3 import AsyncClient
from triton_sam3.contract import ENCODER

FACTOR = 4
ALONE_SECONDS, BUSY_SECONDS, OVERLOADED_SECONDS = 6.0, 6.0, 12.0
CALLERS_AT_CAPACITY = 16
TIMEOUT = 20.0
SHIPPED_QUEUE, SHORT_QUEUE = "max_queue_size: 16", "max_queue_size: 2"


@dataclass(frozen=True)
class Wave:
    """Requests sent from another process."""

    outcomes: tuple[Outcome, ...]
    seconds: float

    @property
    def answered(self) -> list[float]:
        """Seconds that right answers took."""
        return [one.ended - one.began for one in self.outcomes if one.kind is Kind.RIGHT]

    def p99(self) -> float:
        return float(np.percentile(self.answered, 99)) if self.answered else float("nan")


def overloaded(bench: Bench, title: str) -> Result:
    """New images at four times the rate that 16 callers get, none of them sent again."""
    return _overload(bench.stand(), bench, title)


def overloaded_with_short_queue(bench: Bench, title: str) -> Result:
    """The same where only 2 images may wait for the encoder: fewer accepted, and sooner."""
    repository = bench.copy({ENCODER: {SHIPPED_QUEUE: SHORT_QUEUE}})
    with Stand(repository, bench.folder()) as stand:
        return _overload(stand, bench, title)


def _overload(stand: Stand, bench: Bench, title: str) -> Result:
    asked = bench.asked(stand)
    alone = _send(stand, asked, ALONE_SECONDS, callers=1)
    busy = _send(stand, asked, BUSY_SECONDS, callers=CALLERS_AT_CAPACITY)
    capacity = len(busy.answered) / busy.seconds
    waves: list[Wave] = []
    with Trial(title, stand, asked, callers=[Caller(stand.grpc)], timeout=TIMEOUT) as trial:
        trial.strike(
            lambda: waves.append(_send(stand, asked, OVERLOADED_SECONDS, rate=FACTOR * capacity))
        )
        trial.recover()
        trial.others.extend(waves[0].outcomes)
    trial.remark = _told(alone, capacity, waves[0])
    return trial.result()


def _told(alone: Wave, capacity: float, wave: Wave) -> str:
    refused = [one.ended - one.began for one in wave.outcomes if one.kind is Kind.CLEAR]
    kinds = Counter(one.said.split(":")[0] for one in wave.outcomes if one.kind is Kind.CLEAR)
    early = float(np.median(refused)) if refused else float("nan")
    return (
        f"capacity {capacity:.0f}/s, sent {len(wave.outcomes) / OVERLOADED_SECONDS:.0f}/s; "
        f"accepted {len(wave.answered)}, p99 {wave.p99():.2f} s = {wave.p99() / alone.p99():.1f} × "
        f"the unloaded {alone.p99():.2f} s; refused after {early:.2f} s (median): "
        + ", ".join(f"{count} {name}" for name, count in kinds.most_common())
    )


def _send(
    stand: Stand,
    asked: Sequence[Question],
    seconds: float,
    *,
    callers: int = 0,
    rate: float = 0.0,
) -> Wave:
    """From a process of its own: what callers cost must not delay those who watch."""
    context = multiprocessing.get_context("spawn")
    arguments = (stand.grpc, list(asked), seconds, callers, rate)
    with context.Pool(1) as pool:
        return pool.apply(_run, arguments)


def _run(url: str, asked: Sequence[Question], seconds: float, callers: int, rate: float) -> Wave:
    work = _at_rate(url, asked, seconds, rate) if rate else _in_turn(url, asked, seconds, callers)
    return Wave(tuple(asyncio.run(work)), seconds)


async def _in_turn(
    url: str, asked: Sequence[Question], seconds: float, callers: int
) -> list[Outcome]:
    """Each caller asks again as soon as it is answered."""
    async with AsyncClient(url, retries=0, remember_images=0, timeout=TIMEOUT) as client:
        await _ask(client, asked[0])
        until = time.monotonic() + seconds

        async def repeat(number: int) -> list[Outcome]:
            outcomes = []
            while time.monotonic() < until:
                number += 1
                outcomes.append(await _ask(client, asked[number % len(asked)]))
            return [one for one in outcomes if one.ended < until]

        shares = await asyncio.gather(*map(repeat, range(callers)))
    return [one for share in shares for one in share]


async def _at_rate(
    url: str, asked: Sequence[Question], seconds: float, rate: float
) -> list[Outcome]:
    """At fixed times, whether or not the earlier ones were answered."""
    async with AsyncClient(url, retries=0, remember_images=0, timeout=TIMEOUT) as client:
        await _ask(client, asked[0])
        began, asking = time.monotonic(), []
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
            asking.append(asyncio.create_task(_ask(client, asked[number % len(asked)])))
        return list(await asyncio.gather(*asking))


async def _ask(client: AsyncClient, question: Question) -> Outcome:
    began = time.monotonic()
    answer: npt.NDArray[np.bool_] | BaseException
    try:
        answer, said = (await client.segment(question.image, points=[question.point])).masks, ""
    except Exception as error:
        answer, said = error, f"{type(error).__name__}: {error}"
    ended = time.monotonic()
    kind = judge(answer, question.mask, ended - began, TIMEOUT)
    return Outcome(began, ended, kind, said)
