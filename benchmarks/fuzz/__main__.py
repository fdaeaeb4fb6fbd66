"""python -m benchmarks.fuzz: fuzz the served demo model, and rewrite RESULTS.md's section."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import artifacts
from benchmarks.environment import ROOT, provenance
from benchmarks.faults.stand import variant
from benchmarks.fuzz.report import markdown
from benchmarks.fuzz.run import Fuzzer, Outcome, fuzz
from benchmarks.fuzz.tally import Finding
from benchmarks.results import write_section
from server import TritonServer

FINDINGS = ROOT / "build" / "fuzz" / "findings.jsonl"
KEPT_BYTES = 32 * 2**20
"""Few kept images, so that the warm-up fills the store and later growth is not the store's; but
more than are added between two clicks on the image that all requests ask about."""

console = Console(highlight=False, log_path=False)


def main(
    requests: Annotated[int, typer.Option(min=4, help="Requests after the warm-up.")] = 20_000,
    seed: Annotated[int, typer.Option(min=0, help="The same seed sends the same requests.")] = 0,
    write: Annotated[bool, typer.Option(help="Rewrite RESULTS.md's section.")] = True,
) -> None:
    """Send malformed requests of every kind, and check that the server copes."""
    origin = provenance(f"python -m benchmarks.fuzz --requests {requests} --seed {seed}")
    built = artifacts.demo(progress=console.log).repository
    with TemporaryDirectory(prefix="triton-sam3-fuzz-") as folder:
        models = variant(built, Path(folder), KEPT_BYTES)
        with TritonServer(models, log=Path(folder) / "log") as server:
            outcome = _fuzz(server, requests, seed)
            _save(outcome.kept)
    _show(outcome)
    if write:
        write_section("fuzz", markdown(outcome, origin))
    raise typer.Exit(bool(outcome.findings) or not outcome.same_processes)


def _fuzz(server: TritonServer, requests: int, seed: int) -> Outcome:
    with closing(Fuzzer(server)) as fuzzer:
        try:
            return fuzz(fuzzer, requests, seed, console.log)
        except Exception:  # whatever it was, the requests that led to it tell why
            _save([*fuzzer.findings, *fuzzer.tally.recent])
            console.print(f"the requests before the failure are in {FINDINGS}")
            raise


def _save(findings: list[Finding]) -> None:
    FINDINGS.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(finding.record()) for finding in findings)
    FINDINGS.write_text("\n".join(lines), encoding="utf-8")


def _show(outcome: Outcome) -> None:
    console.print(dict(outcome.tally.total), markup=False)
    by_line = Counter(finding.line() for finding in outcome.kept)
    for line, count in by_line.most_common(40):
        console.print(f"{count} × {line[:300]}", style="red", markup=False)
    for mark in outcome.marks:
        sizes = {"resident": mark.resident, "/dev/shm": mark.shared, **mark.parts}
        console.print("MiB:", *(f"{name} {size / 2**20:.1f}" for name, size in sizes.items()))


if __name__ == "__main__":
    typer.run(main)
