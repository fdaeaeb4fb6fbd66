"""`make perf`: run NVIDIA's perf_analyzer on the demo model, and publish its output."""

from __future__ import annotations

import csv
import shlex
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import artifacts, perf_inputs
from benchmarks.environment import provenance
from benchmarks.figures import markdown_table
from benchmarks.perf_analyzer import PerfAnalyzer, PerfAnalyzerError, find
from benchmarks.results import write_section
from export import check
from server import TritonServer

SECTION = "perf-analyzer"
FOLDER = Path("build/perf")
STABLE_PERCENT = 50
"""How much windows may differ; perf_analyzer's default of 10 % is never met on a shared machine."""
WINDOW_MILLISECONDS = 2000
OUTPUT_BYTES = 32 << 20
"""Room for each output in shared memory."""

GRPC, HTTP, SHARED_MEMORY = "grpc", "http", "shared memory"


@dataclass(frozen=True)
class Case:
    """One run of perf_analyzer."""

    what: str
    model: str
    inputs: str
    transport: str
    clients: int = 1

    def arguments(self, grpc_address: str, http_address: str, report: Path) -> list[str]:
        """perf_analyzer's arguments."""
        address = http_address if self.transport == HTTP else grpc_address
        words = [
            *("-m", self.model, "-b", "1"),
            *("-i", "http" if self.transport == HTTP else "grpc", "-u", address),
            *("--input-data", str(FOLDER / self.inputs)),
            *("--concurrency-range", str(self.clients)),
            *("-s", str(STABLE_PERCENT), "-p", str(WINDOW_MILLISECONDS), "-f", str(report)),
        ]
        if self.transport == SHARED_MEMORY:
            size = str(OUTPUT_BYTES)
            words += ["--shared-memory", "system", "--output-shared-memory-size", size]
        return words


def cases() -> list[Case]:
    """Encoder, ensemble and decoder over every transport they accept; then concurrent clicks."""
    encode = ("encode", "sam3_image_encoder", perf_inputs.ENCODER)
    cold = ("cold: image with every request", "sam3_interactive", perf_inputs.ENSEMBLE)
    cold_shared = (cold[0], cold[1], perf_inputs.ALL_INPUTS)
    warm = ("warm: click by id", "sam3_prompt_decoder", perf_inputs.WARM)
    stateless = ("click with embeddings", "sam3_prompt_decoder", perf_inputs.EMBEDDINGS)
    mixed = ("mixed: id and embeddings in turns", "sam3_prompt_decoder", perf_inputs.MIXED)
    return [
        *(Case(*encode, transport) for transport in (GRPC, HTTP, SHARED_MEMORY)),
        *(Case(*cold, transport) for transport in (GRPC, HTTP)),
        Case(*cold_shared, SHARED_MEMORY),
        *(Case(*warm, transport) for transport in (GRPC, HTTP)),
        *(Case(*stateless, transport) for transport in (GRPC, HTTP)),
        *(Case(*mixed, transport) for transport in (GRPC, HTTP)),
        Case(*warm, GRPC, clients=16),
    ]


@dataclass(frozen=True)
class Run:
    """A case, its command line, and perf_analyzer's output."""

    case: Case
    command: str
    output: str
    per_second: float
    p50: float
    p99: float
    """Milliseconds, like p50."""

    def row(self) -> list[str]:
        case = self.case
        latencies = [f"{self.p50:.1f} ms", f"{self.p99:.1f} ms"]
        rate = f"{self.per_second:.1f}"
        return [case.what, case.transport, str(case.clients), rate, *latencies]


def run_case(analyzer: PerfAnalyzer, case: Case, grpc_url: str, http_url: str) -> Run:
    """Run perf_analyzer once. Raises PerfAnalyzerError."""
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.csv"
        grpc_address, http_address = (url.split("://")[1] for url in (grpc_url, http_url))
        output = analyzer.run(case.arguments(grpc_address, http_address, report))
        with report.open() as file:
            numbers = next(csv.DictReader(file))
    shown = case.arguments("127.0.0.1:8001", "127.0.0.1:8000", Path("report.csv"))
    return Run(
        case,
        shlex.join(["perf_analyzer", *shown]),
        output,
        float(numbers["Inferences/Second"]),
        float(numbers["p50 latency"]) / 1000,
        float(numbers["p99 latency"]) / 1000,
    )


HEADER = ("request", "transport", "clients", "per second", "p50", "p99")


def section(runs: list[Run], origin: str, version: str) -> str:
    """The section of the results page."""
    details = [
        f"<details><summary>{run.case.what}, {run.case.transport}, {run.case.clients} "
        f"client{'s' if run.case.clients > 1 else ''}</summary>\n\n"
        f"```console\n$ {run.command}\n{run.output.strip()}\n```\n</details>"
        for run in runs
    ]
    return "\n\n".join(
        [
            "## perf_analyzer",
            origin,
            f"{version}; the demo model. {len(check.PHOTOS)} photos, or one where embeddings are "
            "sent, cycling through prompts of every kind (points, a box, two objects); input files "
            "from `python -m benchmarks.perf_inputs URL FOLDER`. `-s 50`: windows may differ by "
            "half. Each transport was measured after the other, so small differences between them "
            "mean nothing.",
            markdown_table(HEADER, [run.row() for run in runs]),
            *details,
        ]
    )


def main(
    write: Annotated[bool, typer.Option(help="Rewrite the results page's section.")] = True,
) -> None:
    """Run perf_analyzer on every kind of request to the demo model."""
    console = Console(highlight=False, soft_wrap=True)
    origin = provenance("make perf").markdown()
    try:
        analyzer = find()
        with TritonServer(artifacts.demo().repository) as server:
            perf_inputs.write(server.grpc_url, FOLDER)
            runs = []
            for case in cases():
                run = run_case(analyzer, case, server.grpc_url, server.http_url)
                runs.append(run)
                console.print("  ".join(run.row()))
    except PerfAnalyzerError as error:
        console.print(f"error: {error}", markup=False)
        raise typer.Exit(1) from error
    if write:
        write_section(SECTION, section(runs, origin, analyzer.version))


if __name__ == "__main__":
    typer.run(main)
