"""Which tritonserver to run, and what it needs around it.

One on PATH (the NVIDIA container) is complete and is used as it is. The one inside
nvidia-pytriton has a Python backend only and no stub beside it; it gets a private folder:

    work_dir/backends/python/        libtriton_python.so, its utilities, this Python's stub
    work_dir/backends/onnxruntime/   model.py: serves model.onnx under the C++ backend's name
    work_dir/lib/                    the libpython that the stub embeds
    work_dir/bin/python3             only where `python3` beside this Python is another one
    work_dir/venv                    only where this Python's path is not in ASCII
"""

import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from server.errors import TritonNotFoundError

OWN_BACKENDS = Path(__file__).parent / "backends"
PYTHON_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
STUB = "triton_python_backend_stub"


@dataclass(frozen=True)
class Installation:
    """A tritonserver that is ready to start.

    backend_directory: None where the server's own default is right.
    environment: variables to add to the caller's, PATH and LD_LIBRARY_PATH already extended.
    """

    executable: Path
    backend_directory: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


def find(work_dir: Path, environment: Mapping[str, str]) -> Installation:
    """Find tritonserver on the environment's PATH, else in nvidia-pytriton.

    work_dir: an existing private folder; filled only for nvidia-pytriton's server.
    Raises TritonNotFoundError.
    """
    on_path = shutil.which("tritonserver", path=environment.get("PATH", os.defpath))
    if on_path:
        return Installation(Path(on_path))
    package = _pytriton()
    _check_numpy(version("numpy"))
    backends = _assemble_backends(package / "tritonserver", work_dir / "backends")
    paths = {
        "PATH": [_python_directory(work_dir / "bin")],
        "LD_LIBRARY_PATH": [
            _libpython_directory(work_dir / "lib"),
            package.parent / "nvidia_pytriton.libs",
        ],
    }
    return Installation(
        executable=package / "tritonserver/bin/tritonserver",
        backend_directory=backends,
        environment={name: _prepend(paths[name], environment.get(name)) for name in paths},
    )


def _pytriton() -> Path:
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise TritonNotFoundError(
            "No tritonserver found: none is on PATH and nvidia-pytriton is not installed. "
            "Install it with: pip install '.[server]'"
        )
    return Path(spec.origin).parent


def _check_numpy(installed: str) -> None:
    """NumPy 2 lays its arrays out anew: the stub would hand models the first value for all."""
    if int(installed.partition(".")[0]) >= 2:
        raise TritonNotFoundError(
            f"nvidia-pytriton's Python backend misreads every array with NumPy {installed}. "
            "Install an older one with: pip install 'numpy<2'"
        )


def _assemble_backends(tritonserver: Path, target: Path) -> Path:
    stub = tritonserver / "python_backend_stubs" / PYTHON_VERSION / STUB
    if not stub.exists():
        known = ", ".join(sorted(path.name for path in stub.parent.parent.glob("3.*")))
        raise TritonNotFoundError(
            f"nvidia-pytriton has no Python backend for Python {PYTHON_VERSION}, only for {known}. "
            "Use one of those."
        )
    python = target / "python"
    python.mkdir(parents=True)
    # A copy: Triton refuses a library whose real path is outside the backend directory.
    shutil.copy2(tritonserver / "backends/python/libtriton_python.so", python)
    utilities = "triton_python_backend_utils.py"
    (python / utilities).symlink_to(tritonserver / "backends/python" / utilities)
    (python / STUB).symlink_to(stub)
    for model in OWN_BACKENDS.glob("*/model.py"):
        (target / model.parent.name).mkdir()
        shutil.copy2(model, target / model.parent.name)
    return target


def _libpython_directory(target: Path) -> Path:
    """A folder with this Python's own libpython alone: the stub would load any it finds first."""
    name = f"libpython{PYTHON_VERSION}.so.1.0"
    folders = (sysconfig.get_config_var("LIBDIR"), f"{sys.base_exec_prefix}/lib")
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    candidates = [
        Path(folder) / sub / name for folder in folders if folder for sub in ("", multiarch)
    ]
    found = next((path for path in candidates if path.exists()), None)
    if found is None:
        raise TritonNotFoundError(
            f"Triton's Python backend needs {name}, and the Python at {sys.base_prefix} has none. "
            "Use a Python built with --enable-shared, or install your system's libpython package "
            f"(Debian: libpython{PYTHON_VERSION})."
        )
    target.mkdir()
    (target / name).symlink_to(found)
    return target


def _python_directory(target: Path) -> Path:
    """The folder whose `python3` is this interpreter: the stub finds its packages through it."""
    beside = _in_ascii(Path(sys.executable).parent, target.with_name("venv"))
    if (beside / "python3").exists() and (beside / "python3").samefile(sys.executable):
        return beside
    target.mkdir()
    (target / "python3").symlink_to(sys.executable)
    return target


def _in_ascii(folder: Path, link: Path) -> Path:
    """The same folder by a path that the stub's Python can read, whose file system is in ASCII.

    By a link to the environment as a whole: packages, such as torch, ask where they are.
    """
    if str(folder).isascii() or not folder.is_relative_to(sys.prefix):
        return folder
    link.symlink_to(sys.prefix, target_is_directory=True)
    return link / folder.relative_to(sys.prefix)


def _prepend(paths: Sequence[Path], existing: str | None) -> str:
    new = [str(path) for path in paths]
    return os.pathsep.join([*new, existing] if existing else new)
