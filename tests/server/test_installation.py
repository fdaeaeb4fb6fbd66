import importlib.util
import os
import sys
import sysconfig
from pathlib import Path

import pytest

from server import StartError, TritonNotFoundError, TritonServer, installation
from tests.server import tiny
from tests.server.conftest import Start

NOWHERE = {"PATH": "/nowhere"}


def test_nvidia_pytritons_server_gets_what_it_lacks(tmp_path: Path) -> None:
    found = installation.find(tmp_path, {**NOWHERE, "LD_LIBRARY_PATH": "/theirs"})
    assert found.executable.is_file()
    assert found.backend_directory
    files = {
        str(p.relative_to(found.backend_directory)) for p in found.backend_directory.rglob("*")
    }
    assert files == {
        "onnxruntime",
        "onnxruntime/model.py",
        "python",
        "python/libtriton_python.so",
        "python/triton_python_backend_stub",
        "python/triton_python_backend_utils.py",
    }
    libpython, libraries, theirs = found.environment["LD_LIBRARY_PATH"].split(":")
    assert [path.name for path in Path(libpython).iterdir()] == [
        f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    ]
    assert list(Path(libraries).glob("libtritonserver*.so"))
    assert theirs == "/theirs"
    python, path = found.environment["PATH"].split(":")
    assert (Path(python) / "python3").samefile(sys.executable)
    assert path == "/nowhere"


def test_numpy_2_is_rejected_before_it_misreads_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installation, "version", lambda _: "2.4.6")
    with pytest.raises(TritonNotFoundError, match=r"NumPy 2\.4\.6.*pip install 'numpy<2'"):
        installation.find(tmp_path, NOWHERE)


def test_a_tritonserver_on_path_is_used_as_it_is(
    plus_one_repository: Path, start: Start, tmp_path: Path
) -> None:
    """As in the NVIDIA container: it finds its libraries and backends on its own."""
    parts = tmp_path / "container"
    parts.mkdir()
    bundled = installation.find(parts, NOWHERE)
    script = parts / "tritonserver"
    script.write_text(
        "#!/bin/sh\n"
        f"export LD_LIBRARY_PATH={bundled.environment['LD_LIBRARY_PATH']}\n"
        f"export PATH={bundled.environment['PATH']}:$PATH\n"
        f'exec {bundled.executable} "$@" --backend-directory={bundled.backend_directory}\n'
    )
    script.chmod(0o755)
    (tmp_path / "work").mkdir()
    environment = {"PATH": f"{parts}:{os.environ['PATH']}"}

    found = installation.find(tmp_path / "work", environment)
    assert found == installation.Installation(script)
    assert not list((tmp_path / "work").iterdir())

    server = start(plus_one_repository, env=environment)
    assert tiny.get(f"{server.http_url}/v2/models/plus_one/ready") == ""


def test_a_tritonserver_for_another_machine(plus_one_repository: Path, tmp_path: Path) -> None:
    script = tmp_path / "tritonserver"
    script.write_bytes(b"\x7fELF not really")
    script.chmod(0o755)
    server = TritonServer(plus_one_repository, env={"PATH": str(tmp_path)})
    with pytest.raises(StartError, match=r"could not be executed:\n.*Exec format error.*$"):
        server.start()


def test_without_any_tritonserver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(TritonNotFoundError, match="none is on PATH and nvidia-pytriton is not"):
        installation.find(tmp_path, NOWHERE)


def test_a_python_without_a_stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "PYTHON_VERSION", "3.99")
    with pytest.raises(TritonNotFoundError, match=r"Python 3\.99, only for 3\.10, 3\.11, 3\.12"):
        installation.find(tmp_path, NOWHERE)


def test_a_python_without_a_shared_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_config_var", lambda _: None)
    monkeypatch.setattr(sys, "base_exec_prefix", str(tmp_path))
    with pytest.raises(TritonNotFoundError, match=r"needs libpython3.* --enable-shared"):
        installation.find(tmp_path, NOWHERE)


def test_an_interpreter_beside_another_python3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/python3").symlink_to("/bin/sh")
    (tmp_path / "theirs/python3.x").symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "theirs/python3.x"))
    found = installation.find(tmp_path, NOWHERE)
    first = Path(found.environment["PATH"].split(":")[0])
    assert (first / "python3").samefile(sys.executable)


def test_an_environment_whose_path_is_not_ascii(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stub's Python cannot read such a path, and torch would not start from it."""
    folder, work_dir = tmp_path / "José", tmp_path / "work"
    folder.mkdir()
    work_dir.mkdir()
    (folder / "venv").symlink_to(sys.prefix)
    monkeypatch.setattr(sys, "prefix", str(folder / "venv"))
    monkeypatch.setattr(sys, "executable", str(folder / "venv/bin" / Path(sys.executable).name))
    found = installation.find(work_dir, NOWHERE)
    first = Path(found.environment["PATH"].split(":")[0])
    assert str(first).isascii()
    assert (first / "python3").samefile(sys.executable)
