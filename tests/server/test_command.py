from pathlib import Path

import pytest

from server import SetupError
from server.command import ADMIN_HEADER, Address, command_line

LOOPBACK = Address("127.0.0.1", 1, 2, 3)


def build(address: Address = LOOPBACK, **options: object) -> list[str]:
    return command_line(
        Path("/bin/tritonserver"),
        Path("/models"),
        address,
        shm_prefix="mine_",
        admin_key="secret",
        **options,  # type: ignore[arg-type]
    )


def test_everything_that_is_passed() -> None:
    assert build(backend_directory=Path("/backends"), extra_args=["--log-verbose=1"]) == [
        "/bin/tritonserver",
        "--model-repository=/models",
        "--model-control-mode=explicit",
        "--load-model=*",
        "--disable-auto-complete-config",
        "--http-address=127.0.0.1",
        "--http-port=1",
        "--grpc-address=127.0.0.1",
        "--grpc-port=2",
        "--metrics-address=127.0.0.1",
        "--metrics-port=3",
        "--exit-timeout-secs=5",
        "--backend-config=python,shm-region-prefix-name=mine_",
        "--backend-directory=/backends",
        "--log-verbose=1",
    ]


def test_without_model_control_triton_keeps_its_default_mode() -> None:
    removed = ["--model-control-mode=explicit", "--load-model=*"]
    assert build(model_control=False) == [arg for arg in build() if arg not in removed]


def test_backend_directory_is_the_servers_own_unless_given() -> None:
    assert not any("--backend-directory" in arg for arg in build())


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.7"])
def test_beyond_loopback_administration_needs_the_key(host: str) -> None:
    restricted = [arg for arg in build(Address(host, 1, 2, 3)) if "restricted" in arg]
    guard = f"model-repository,shared-memory,trace,logging:{ADMIN_HEADER}=secret"
    assert restricted == [
        f"--http-restricted-api={guard}",
        f"--grpc-restricted-protocol={guard}",
    ]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8"])
def test_loopback_is_open(host: str) -> None:
    assert not any("restricted" in arg for arg in build(Address(host, 1, 2, 3)))


def test_extra_args_must_not_move_the_server() -> None:
    with pytest.raises(SetupError, match="--grpc-address, --http-port"):
        build(extra_args=["--http-port=9", "--grpc-address=0.0.0.0", "--id=x"])


def test_a_wildcard_is_reached_through_loopback() -> None:
    assert Address("0.0.0.0", 1, 2, 3).reachable_host == "127.0.0.1"
    assert Address("192.0.2.7", 1, 2, 3).reachable_host == "192.0.2.7"
