"""Real runs of perf_analyzer; if it is unavailable, the tests are skipped with the reason."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from benchmarks import perf, perf_analyzer, perf_inputs
from benchmarks.perf import GRPC, HTTP, SHARED_MEMORY, Case, Run, cases, run_case, section
from benchmarks.perf_analyzer import PerfAnalyzer, PerfAnalyzerError
from server import TritonServer


@pytest.fixture(scope="module")
def analyzer() -> PerfAnalyzer:
    try:
        return perf_analyzer.find()
    except PerfAnalyzerError as error:
        pytest.skip(f"no perf_analyzer: {error}")


@pytest.fixture
def inputs(server: TritonServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perf, "FOLDER", tmp_path)
    monkeypatch.setattr(perf, "WINDOW_MILLISECONDS", 500)
    monkeypatch.setattr(perf, "STABLE_PERCENT", 999)  # the machine may be busy
    perf_inputs.write(server.grpc_url, tmp_path)


@pytest.mark.usefixtures("inputs")
def test_a_run_is_parsed_and_reported_as_it_was(
    server: TritonServer, analyzer: PerfAnalyzer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether every transport accepts its files is tested by running the documented commands."""
    typed: list[str] = []
    run_as_typed = PerfAnalyzer.run

    def note(self: PerfAnalyzer, arguments: list[str]) -> str:
        typed.extend(arguments)
        return run_as_typed(self, arguments)

    monkeypatch.setattr(PerfAnalyzer, "run", note)
    case = Case("a request", "sam3_prompt_decoder", perf_inputs.MIXED, GRPC)
    run = run_case(analyzer, case, server.grpc_url, server.http_url)
    assert "Request concurrency: 1" in run.output
    assert _printed("Throughput", run) == pytest.approx(run.per_second, abs=0.001)
    for percentile, milliseconds in (("p50", run.p50), ("p99", run.p99)):
        assert _printed(f"{percentile} latency", run) == pytest.approx(1000 * milliseconds, abs=1)
    _, *shown = shlex.split(run.command)
    pairs = zip(typed, typed[1:], shown[1:], strict=False)
    assert {option for option, used, published in pairs if used != published} == {"-u", "-f"}


def _printed(what: str, run: Run) -> float:
    """The number for people: per second, or of microseconds."""
    (number,) = re.findall(rf"^ +{what}: ([\d.]+) (?:infer/sec|usec)$", run.output, re.M)
    return float(number)


@pytest.mark.usefixtures("inputs")
def test_a_failing_run_says_what_perf_analyzer_said(
    server: TritonServer, analyzer: PerfAnalyzer
) -> None:
    case = Case("a request", "no_such_model", perf_inputs.ENCODER, GRPC)
    with pytest.raises(PerfAnalyzerError, match="no_such_model"):
        run_case(analyzer, case, server.grpc_url, server.http_url)


def test_every_model_is_measured_over_every_transport_it_supports() -> None:
    driven = {(case.model, case.transport) for case in cases()}
    models = ("sam3_image_encoder", "sam3_interactive", "sam3_prompt_decoder")
    wanted = {(model, transport) for model in models for transport in (GRPC, HTTP, SHARED_MEMORY)}
    # With shared memory, perf_analyzer does not support omitting a model's optional inputs.
    assert driven == wanted - {("sam3_prompt_decoder", SHARED_MEMORY)}


def test_a_run_that_times_out_is_a_failure_too() -> None:
    endless = ["-c", "echo warming up; exec sleep 60"]
    with pytest.raises(PerfAnalyzerError, match=r"timed out after 1 s: warming up"):
        PerfAnalyzer("sh", "").run(endless, timeout=1)


def test_the_section_keeps_every_output() -> None:
    runs = [Run(case, "perf_analyzer …", "its words", 10.0, 1.0, 2.0) for case in cases()]
    text = section(runs, "where and with what", "version")
    assert text.count("its words") == len(runs)
    assert text.count("<details>") == text.count("</details>") == len(runs)
