"""One container's process 1 for all tests that do it no harm, and tools that may be missing."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.faults.proxies import certify, program
from tests.docker.harness import Container


@pytest.fixture(scope="session")
def container(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """As in the image: on every interface, so that what administers a server is closed."""
    with Container(repository, tmp_path_factory.mktemp("container")) as one:
        yield one.wait_until_serving()


@pytest.fixture(scope="session")
def tool() -> Callable[[str, str], Path]:
    """Find a program, or skip with how to install it."""

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
