"""The GPU benchmark on a machine without a GPU, and how it evaluates its measurements."""

from __future__ import annotations

import ctypes

import pytest
import torch

from benchmarks import cuda
from benchmarks.artifacts import Artifacts
from benchmarks.findings import Findings
from benchmarks.timing import Sample


def silent(_: str) -> None:
    """Ignore progress."""


def test_without_a_gpu_every_figure_is_listed_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    figures = cuda.run_in_process(silent).figures + cuda.run_served(silent).figures
    specs = [
        cuda._by(encoder, one)
        for encoder in cuda.ENCODERS
        for one in cuda.IN_PROCESS_FIGURES[encoder]
    ]
    names = [one.name for one in (cuda.DEMO_ACCURACY, *specs, *cuda.SERVED_FIGURES)]
    assert [figure.name for figure in figures] == names
    assert {figure.verdict for figure in figures} == {"not measured"}
    assert all("GPU" in figure.note for figure in figures)


def test_tensorrt_is_looked_for_before_its_graph_is_exported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[str] = []

    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    def graphs() -> Artifacts:
        made.append("graph")
        raise AssertionError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(RuntimeError, match=r"no TensorRT \(libnvinfer"):
        cuda._in_process(graphs, "tensorrt", Findings(silent))
    assert not made


def test_the_best_rate_is_that_of_the_best_batch_size() -> None:
    seconds = {1: Sample((0.010,)), 4: Sample((0.020, 0.025)), 8: Sample((0.080,))}
    assert cuda._best_rate(seconds).values == (200.0, 160.0)
