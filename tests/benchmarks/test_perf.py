"""Real runs of perf_analyzer; where it cannot be had, the tests are skipped with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tritonclient.grpc import InferenceServerClient

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
def inputs(server: TritonServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(perf, "FOLDER", tmp_path)
    monkeypatch.setattr(perf, "WINDOW_MILLISECONDS", 500)
    monkeypatch.setattr(perf, "STABLE_PERCENT", 999)  # the machine may be busy
    perf_inputs.write(server.grpc_url, tmp_path)
    yield
    # perf_analyzer asks once, right after the last answer, which Triton 2.51 refuses now and then.
    with InferenceServerClient(server.grpc_url.removeprefix("grpc://")) as client:
        client.unregister_system_shared_memory()


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize(
    ("model", "file", "transport"),
    [
        ("sam3_prompt_decoder", perf_inputs.MIXED, GRPC),
        ("sam3_interactive", perf_inputs.ENSEMBLE, HTTP),
        ("sam3_interactive", perf_inputs.ALL_INPUTS, SHARED_MEMORY),
    ],
)
def test_perf_analyzer_takes_the_files(
    model: str, file: str, transport: str, server: TritonServer, analyzer: PerfAnalyzer
) -> None:
    case = Case("a request", model, file, transport)
    run = run_case(analyzer, case, server.grpc_url, server.http_url)
    assert run.per_second > 0
    assert 0 < run.p50 <= run.p99
    assert "Request concurrency: 1" in run.output


@pytest.mark.usefixtures("inputs")
def test_a_failing_run_says_what_perf_analyzer_said(
    server: TritonServer, analyzer: PerfAnalyzer
) -> None:
    case = Case("a request", "no_such_model", perf_inputs.ENCODER, GRPC)
    with pytest.raises(PerfAnalyzerError, match="no_such_model"):
        run_case(analyzer, case, server.grpc_url, server.http_url)


def test_every_model_is_driven_over_every_transport_it_takes() -> None:
    driven = {(case.model, case.transport) for case in cases()}
    models = ("sam3_image_encoder", "sam3_interactive", "sam3_prompt_decoder")
    wanted = {(model, transport) for model in models for transport in (GRPC, HTTP, SHARED_MEMORY)}
    # perf_analyzer takes no shared memory for a model whose optional inputs are left out.
    assert driven == wanted - {("sam3_prompt_decoder", SHARED_MEMORY)}


def test_the_command_on_the_page_is_the_one_that_ran() -> None:
    case = Case("encode", "sam3_image_encoder", "encoder.json", SHARED_MEMORY)
    words = case.arguments("127.0.0.1:8001", "127.0.0.1:8000", Path("report.csv"))
    assert words[words.index("-u") + 1] == "127.0.0.1:8001"
    assert words[words.index("-m") + 1] == "sam3_image_encoder"
    assert "--shared-memory" in words


def test_the_section_keeps_every_output() -> None:
    runs = [Run(case, "perf_analyzer …", "its words", 10.0, 1.0, 2.0) for case in cases()]
    text = section(runs, "where and with what", "version", "the demo model")
    assert text.count("its words") == len(runs)
    assert text.count("<details>") == text.count("</details>") == len(runs)
