"""The distribution's own metadata: that everybody it promises to work for can install it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import metadata, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.conftest import ROOT
from tests.export import tiny

OURS = "triton-sam3"
OLDEST = SpecifierSet(metadata(OURS)["Requires-Python"])


def pins() -> list[Requirement]:
    """Requirements of which pip may take one version only, in whatever extra."""
    given = [Requirement(line) for line in requires(OURS) or []]
    return [one for one in given if any(each.operator == "==" for each in one.specifier)]


def test_every_pin_can_be_installed_by_the_oldest_python() -> None:
    (oldest,) = (each.version for each in OLDEST if each.operator == ">=")
    assert pins()
    said = {pin.name: metadata(pin.name).get_all("Requires-Python") for pin in pins()}
    needs = {name: ",".join(need or []) for name, need in said.items()}
    refused = {name: need for name, need in needs.items() if oldest not in SpecifierSet(need)}
    assert not refused, f"not to be had for Python {oldest}"


REPORTING = """
import sys
import benchmarks, export.check
import onnxruntime
onnxruntime.InferenceSession(sys.argv[1])
"""


def test_telemetry_is_disabled(tmp_path: Path, exported: tiny.Export) -> None:
    """ONNX Runtime would: it leaves an identity in the home folder then."""
    model = exported.repository / "sam3_image_encoder" / "1" / "model.onnx"
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    command = [sys.executable, "-c", REPORTING, str(model)]
    subprocess.run(command, check=True, env=environment, cwd=ROOT)
    left = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")]
    assert not [path for path in left if "Microsoft" in path]


def test_another_python_is_rejected_before_anything_is_installed(tmp_path: Path) -> None:
    newer = tmp_path / "python"
    run = "import sys; sys.version_info = (3, 14, 0); exec(sys.argv[1])"
    newer.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{run}" "$2"\n')
    newer.chmod(0o755)
    command = ["make", "install", f"PYTHON={newer}", f"VENV={tmp_path / 'venv'}"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert f"Python 3.10, 3.11 or 3.12 is needed, and {newer} is another version" in refused.stderr
    assert not (tmp_path / "venv").exists()
