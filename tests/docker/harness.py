"""What the tests of `docker/` stand on: process 1 of the container, and tools' output as text."""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.faults.container import Container, Process, free_ports

__all__ = ["CHART", "DOCKER", "ROOT", "Container", "Process", "free_ports", "run"]

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
CHART = DOCKER / "helm" / "triton-sam3"


def run(command: Sequence[str | Path], **options: Any) -> "subprocess.CompletedProcess[str]":
    """A tool's whole output, as text; the caller judges its status."""
    return subprocess.run(
        [str(part) for part in command],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )
