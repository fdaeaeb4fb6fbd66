"""One container's process 1 shared by all tests that do not harm it, and optional tools."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.faults.proxies import certify, program
from tests.docker.harness import Container


@pytest.fixture(scope="session")
def container(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """As in the image: listening on every interface, so administration is closed."""
    with Container(repository, tmp_path_factory.mktemp("container")) as one:
        yield one.wait_until_serving()


@pytest.fixture(scope="session")
def tool() -> Callable[[str, str], Path]:
    """Find a program, or skip the test and say how to install it."""

    def find(name: str, install: str) -> Path:
        found = program(name)
        if found is None:
            pytest.skip(f"no {name}: {install}")
        return found

    return find


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory, tool: Callable[[str, str], Path]) -> Path:
    """A folder with tls.crt and tls.key for 127.0.0.1."""
    openssl = tool("openssl", "apt-get install openssl")
    return certify(openssl, tmp_path_factory.mktemp("tls"))
