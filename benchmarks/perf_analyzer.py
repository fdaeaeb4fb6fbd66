"""Find NVIDIA's perf_analyzer, or install it under `build/`.

The newest that runs on glibc 2.36 is in tritonclient 2.51.0's wheel; it needs two libraries that
nvidia-pytriton ships under other names.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock

from benchmarks.environment import ROOT

TRITONCLIENT = "2.51.0"
FOLDER = ROOT / "build" / "perf_analyzer"
LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}
"""The names perf_analyzer looks for, and nvidia-pytriton's names for them."""


class PerfAnalyzerError(Exception):
    """perf_analyzer cannot run here, or a run failed; the message says why."""


@dataclass(frozen=True)
class PerfAnalyzer:
    """An executable and the environment variables it needs in addition to the caller's."""

    executable: str
    version: str
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, arguments: list[str], timeout: float = 300) -> str:
        """Return its output; raise PerfAnalyzerError with the output if it fails or times out."""
        try:
            done = subprocess.run(
                [self.executable, *arguments],
                env={**os.environ, **self.environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            said = (error.stdout or b"").decode(errors="replace").strip()[-1000:]
            raise PerfAnalyzerError(f"timed out after {timeout:g} s: {said}") from error
        if done.returncode:
            raise PerfAnalyzerError(f"status {done.returncode}: {done.stdout.strip()[-1000:]}")
        return done.stdout


def find() -> PerfAnalyzer:
    """The one on PATH if it runs, otherwise the one under `build/`, installed if necessary."""
    on_path = shutil.which("perf_analyzer")
    if on_path:
        try:
            return _checked(on_path, {})
        except PerfAnalyzerError:
            pass  # built for a newer glibc, or missing its libraries
    return installed()


def installed() -> PerfAnalyzer:
    """The one under `build/`, installed if it is missing. Raises PerfAnalyzerError."""
    executable = FOLDER / "bin" / "perf_analyzer"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with FileLock(FOLDER / ".lock"):  # two tests may need it at once
        if not executable.exists():
            _install()
            executable.chmod(0o755)
        libraries = _link_libraries()
    paths = [str(libraries), os.environ.get("LD_LIBRARY_PATH", "")]
    return _checked(
        str(executable), {"LD_LIBRARY_PATH": os.pathsep.join(path for path in paths if path)}
    )


def _install() -> None:
    wheel = f"tritonclient=={TRITONCLIENT}"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", wheel]
    done = subprocess.run(
        [*command, "--target", str(FOLDER)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise PerfAnalyzerError(f"pip could not install {wheel}: {done.stderr.strip()[-300:]}")


def _link_libraries() -> Path:
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise PerfAnalyzerError("nvidia-pytriton, whose libraries it needs, is not installed")
    source = Path(spec.origin).parent.parent / "nvidia_pytriton.libs"
    target = FOLDER / "lib"
    target.mkdir(exist_ok=True)
    for wanted, pattern in LIBRARIES.items():
        found = next(source.glob(pattern), None)
        if found is None:
            raise PerfAnalyzerError(f"nvidia-pytriton has no {pattern}")
        link = target / wanted
        link.unlink(missing_ok=True)
        link.symlink_to(found)
    return target


def _checked(executable: str, environment: dict[str, str]) -> PerfAnalyzer:
    try:
        answer = PerfAnalyzer(executable, "", environment).run(["--version"], timeout=30)
    except OSError as error:
        raise PerfAnalyzerError(f"{executable} does not run: {error}") from error
    return PerfAnalyzer(executable, answer.strip(), environment)
