"""What the GPU's benchmark does where there is none, and with what it measures."""

from __future__ import annotations

import pytest
import torch

from benchmarks import cuda
from benchmarks.figures import Figure
from benchmarks.timing import Sample


def test_without_a_gpu_every_figure_is_listed_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outcome = cuda.run(lambda _: None)
    assert [figure.name for figure in outcome.figures] == [asked.name for asked in cuda.ALL]
    assert {figure.verdict for figure in outcome.figures} == {"not measured"}
    assert all("GPU" in figure.note for figure in outcome.figures)


def test_what_fails_takes_only_its_own_figures_away() -> None:
    outcome = cuda.Outcome()

    def fails() -> list[Figure]:
        raise FileNotFoundError("no tritonserver")

    cuda._collect(outcome, [cuda.CLICK_P50], fails)
    cuda._collect(outcome, [cuda.ENCODE], lambda: [cuda.ENCODE.measured(Sample((9.0,)))])
    assert [figure.verdict for figure in outcome.figures] == ["not measured", "aim met"]
    assert outcome.figures[0].note == "FileNotFoundError: no tritonserver"


def test_the_best_rate_is_that_of_the_best_amount() -> None:
    seconds = {1: Sample((0.010,)), 4: Sample((0.020, 0.025)), 8: Sample((0.080,))}
    assert cuda._best_rate(seconds).values == (200.0, 160.0)
