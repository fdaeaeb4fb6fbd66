"""Helpers for the tests of `docker/`: process 1 of the container, and tools' output as text."""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.faults.container import Container, free_ports
from tests.conftest import ROOT

__all__ = ["CHART", "DOCKER", "Container", "free_ports", "run"]

DOCKER = ROOT / "docker"
CHART = DOCKER / "helm" / "triton-sam3"


def run(command: Sequence[str | Path], **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run a tool and capture its output as text; the caller checks its status."""
    return subprocess.run(
        [str(part) for part in command],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )
