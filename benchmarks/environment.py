"""Where and with what a figure was measured, so that it is still meaningful later."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnx",
    "onnxscript",
    "sam3",
    "tritonclient",
    "nvidia-pytriton",
    "openvino",
    "numpy",
)
RELEVANT_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


@dataclass(frozen=True)
class Provenance:
    """Command, commit, machine and versions of one run."""

    command: str
    commit: str
    machine: str
    versions: str
    load: str

    def markdown(self) -> str:
        return "\n".join(
            (
                f"`{self.command}` at commit {self.commit}, load at the start {self.load}  ",
                f"{self.machine}  ",
                f"{self.versions}",
            )
        )


def provenance(command: str) -> Provenance:
    """Describe this run; `command` repeats it."""
    load = f"{os.getloadavg()[0]:.1f}"
    return Provenance(command, commit(), machine(), versions(), load)


def commit(root: Path = ROOT) -> str:
    """Short hash of the checkout, with a note if there are uncommitted changes."""
    head = _output("git", "-C", str(root), "rev-parse", "--short", "HEAD")
    if not head:
        return "unknown (not a git checkout)"
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return f"{head} with uncommitted changes" if changed else head


def machine() -> str:
    """Processor, memory and GPU on one line."""
    info = _read("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info)
    flags = set(re.findall(r"\w+", next(iter(re.findall(r"flags\s*: (.*)", info)), "")))
    telling = [flag for flag in RELEVANT_CPU_FLAGS if flag in flags]
    memory = re.search(r"MemTotal:\s+(\d+)", _read("/proc/meminfo"))
    parts = [
        f"{os.cpu_count()} × {model[1] if model else platform.processor()}",
        " ".join(telling),
        f"{int(memory[1]) / 2**20:.0f} GiB" if memory else "",
        gpu() or "no GPU",
    ]
    return ", ".join(part for part in parts if part)


def gpu() -> str:
    """Name, memory and driver of the first GPU; empty if there is none."""
    query = "--query-gpu=name,memory.total,driver_version"
    lines = _output("nvidia-smi", query, "--format=csv,noheader").splitlines()
    return lines[0] if lines else ""


def versions() -> str:
    """Installed versions of the relevant packages."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join([f"Python {platform.python_version()}", *found])


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
