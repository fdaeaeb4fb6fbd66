"""Which tritonserver to run, and what it needs around it.

A tritonserver on PATH (the NVIDIA container) is complete and is used as is. The one in
nvidia-pytriton has only a Python backend, without a stub next to it; it gets a private folder:

    work_dir/backends/python/        libtriton_python.so, its utilities, this Python's stub
    work_dir/backends/onnxruntime/   model.py: serves model.onnx under the C++ backend's name
    work_dir/lib/                    the libpython that the stub embeds
    work_dir/bin/python3             only if the `python3` next to this Python is another one
    work_dir/venv                    only if this Python's path is not ASCII
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
    """A tritonserver that can be started.

    backend_directory: None if the server's own default is right.
    environment: variables to add to the caller's, PATH and LD_LIBRARY_PATH already extended.
    """

    executable: Path
    backend_directory: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


def find(work_dir: Path, environment: Mapping[str, str]) -> Installation:
    """Find tritonserver on the environment's PATH, or else in nvidia-pytriton.

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
    """Reject NumPy 2, whose array layout differs: models would get the first value everywhere."""
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
            "Use one of these."
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
    """A folder with only this Python's own libpython: the stub loads the first one it finds."""
    name = f"libpython{PYTHON_VERSION}.so.1.0"
    folders = (sysconfig.get_config_var("LIBDIR"), f"{sys.base_exec_prefix}/lib")
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    candidates = [
        Path(folder) / sub / name for folder in folders if folder for sub in ("", multiarch)
    ]
    found = next((path for path in candidates if path.exists()), None)
    if found is None:
        raise TritonNotFoundError(
            f"Triton's Python backend needs {name}, but the Python at {sys.base_prefix} has none. "
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
    """The folder by an ASCII path, the only kind that the stub's Python can read.

    It goes through a link to the whole environment, because packages such as torch look up their
    own location.
    """
    if str(folder).isascii() or not folder.is_relative_to(sys.prefix):
        return folder
    link.symlink_to(sys.prefix, target_is_directory=True)
    return link / folder.relative_to(sys.prefix)


def _prepend(paths: Sequence[Path], existing: str | None) -> str:
    new = [str(path) for path in paths]
    return os.pathsep.join([*new, existing] if existing else new)
