"""Curves, and what one peer's failure costs the others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from benchmarks import growth, measures
from benchmarks.load import Throughput
from benchmarks.stage import HTTP, OURS, Stage
from benchmarks.timing import Sample

STAGE = cast(Stage, SimpleNamespace(artifacts=SimpleNamespace(name="demo")))


def crowds_without(failing: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tables of a crowd's growth in which one peer fails, and what was told."""

    def clients(stage: Stage, name: str, counts: list[int], _: float) -> dict[int, Throughput]:
        if name == failing:
            raise RuntimeError("a caller failed: connection reset")
        return {count: Throughput(count, 10.0 * count, Sample((0.1,))) for count in counts}

    monkeypatch.setattr(measures, "concurrent_clients", clients)
    told: list[str] = []
    growths = growth.clients(STAGE, [OURS, HTTP], [1, 16], 1.0, told.append)
    return [growths[0].markdown(), *told]


def test_a_peer_that_fails_under_a_crowd_leaves_ours_its_curve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table, reason = crowds_without(HTTP, monkeypatch)
    assert "| ours | 10 1/s | 160 1/s |" in table
    assert f"| {HTTP} | — | — |" in table
    assert (
        reason == f"{HTTP}, a crowd: not measured, RuntimeError: a caller failed: connection reset"
    )


def test_without_ours_there_is_no_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="connection reset"):
        crowds_without(OURS, monkeypatch)
