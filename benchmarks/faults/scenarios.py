"""All faults by name, in the order of the report."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.faults import engine_cache, files, overload, processes, requests, resources
from benchmarks.faults.bench import Bench
from benchmarks.faults.load import Kind
from benchmarks.faults.trial import Result
from triton_sam3.contract import DECODER, ENCODER

Scenario = Callable[[Bench, str], Result]


@dataclass(frozen=True)
class Fault:
    """A fault: its short name, its title, and the function that runs it."""

    name: str
    title: str
    run: Scenario


def every() -> Sequence[Fault]:
    """All faults."""
    return [
        Fault("decoder-killed", "decoder process killed", partial(processes.killed, DECODER)),
        Fault("encoder-killed", "encoder process killed", partial(processes.killed, ENCODER)),
        Fault("server-killed", "server killed", processes.server_killed),
        Fault("stuck", "model stuck", processes.stuck),
        Fault("slow", "model slow, a fifth of its speed", processes.slow),
        Fault("client-gone", "clients gone mid-request", requests.client_gone),
        Fault("reset", "connections reset", requests.connections_reset),
        Fault("proxy-502", "proxy answers 502", requests.bad_gateway),
        Fault("poison", "poisoned requests in the batch", requests.poisoned),
        Fault("kept-limit", "memory limit of kept images reached", requests.kept_limit),
        Fault("overload", "overload, 4 × capacity, behind Envoy", overload.overloaded),
        Fault("shm-full", "/dev/shm full", resources.shm_full),
        Fault("engine-cache", "disk of the engine cache full", engine_cache.cache_full),
        Fault("clock", "clock jumps 10 years ahead, then back", resources.clock_jump),
        Fault("onnx", "model.onnx corrupted, restart", partial(files.corrupted, files.ONNX)),
        Fault("pt2", "decoder.pt2 corrupted, restart", partial(files.corrupted, files.PT2)),
        Fault("config", "config.pbtxt corrupted, restart", partial(files.corrupted, files.CONFIG)),
        Fault("checkpoint", "checkpoint of another generation", files.wrong_generation),
        Fault("views", "views opened and never closed", requests.views_never_closed),
    ]


def run(
    repository: Path, names: Sequence[str], progress: Callable[[str, Result | None], None]
) -> list[Result]:
    """Run the named faults, or all if none are; `progress` is called before and after each."""
    results = []
    with (
        TemporaryDirectory(prefix="triton-sam3-faults-") as folder,
        Bench(repository, Path(folder)) as bench,
    ):
        for fault in every():
            if names and fault.name not in names:
                continue
            progress(fault.title, None)
            results.append(_result(fault, bench))
            progress(fault.title, results[-1])
    return results


def _result(fault: Fault, bench: Bench) -> Result:
    """Run a fault; an exception counts as one wrong answer, so the suite fails but continues."""
    try:
        return fault.run(bench, fault.title)
    except Exception as error:
        traceback.print_exc()
        bench.close()  # its server is in an unknown state
        said = files.sentence(f"{type(error).__name__}: {error}")
        return Result(fault.title, {Kind.WRONG: 1}, remark=said)
