"""One container's process 1 for all tests that do it no harm, and tools that may be missing."""

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.docker.harness import Container, run


@pytest.fixture(scope="session")
def container(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """As in the image: on every interface, so that what administers a server is closed."""
    with Container(repository, tmp_path_factory.mktemp("container")) as one:
        yield one.wait_until_serving()


@pytest.fixture(scope="session")
def tool() -> Callable[[str, str], Path]:
    """Find a program, or skip with how to install it."""

    def find(name: str, install: str) -> Path:
        beside = Path(sys.executable).parent / name
        found = str(beside) if beside.exists() else shutil.which(name)
        if found is None:
            pytest.skip(f"no {name}: {install}")
        return Path(found)

    return find


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory, tool: Callable[[str, str], Path]) -> Path:
    """A folder with tls.crt and tls.key for 127.0.0.1."""
    folder = tmp_path_factory.mktemp("tls")
    made = run(
        [
            *(tool("openssl", "apt-get install openssl"), "req", "-x509", "-newkey", "rsa:2048"),
            *("-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", folder / "tls.key", "-out", folder / "tls.crt"),
        ]
    )
    assert made.returncode == 0, made.stderr
    return folder
