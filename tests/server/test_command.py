import re
from pathlib import Path

import pytest

from server import SetupError
from server.command import Address, command_line

LOOPBACK = Address("127.0.0.1", 1, 2, 3)


def build(address: Address = LOOPBACK, **options: object) -> list[str]:
    return command_line(
        Path("/bin/tritonserver"),
        Path("/models"),
        address,
        shm_prefix="mine_",
        **options,  # type: ignore[arg-type]
    )


def test_the_whole_command_line() -> None:
    arguments = build(backend_directory=Path("/backends"), extra_args=["--log-verbose=1"])
    assert [arg for arg in arguments if "restricted" not in arg] == [
        "/bin/tritonserver",
        "--model-repository=/models",
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


def test_backend_directory_is_the_servers_own_unless_given() -> None:
    assert not any("--backend-directory" in arg for arg in build())


ADMINISTRATION = "model-repository,trace,logging"


@pytest.mark.parametrize(
    ("host", "refused"),
    [
        ("127.0.0.1", ADMINISTRATION),
        ("127.8.8.8", ADMINISTRATION),
        ("0.0.0.0", f"{ADMINISTRATION},shared-memory"),
        ("192.0.2.7", f"{ADMINISTRATION},shared-memory"),
    ],
)
def test_administration_requires_a_header_that_nobody_can_send(host: str, refused: str) -> None:
    options, values = zip(
        *(arg.split("=", 1) for arg in build(Address(host, 1, 2, 3)) if "restricted" in arg),
        strict=True,
    )
    assert options == ("--http-restricted-api", "--grpc-restricted-protocol")
    for value in values:
        apis, key = value.split(":nobody\n=")
        assert apis == refused
        assert re.fullmatch(r"[0-9a-f]{64}\n", key)


def test_each_server_has_a_key_of_its_own() -> None:
    assert build() != build()


def test_extra_args_must_not_move_the_server() -> None:
    with pytest.raises(SetupError, match="--grpc-address, --http-port"):
        build(extra_args=["--http-port=9", "--grpc-address=0.0.0.0", "--id=x"])


def test_a_wildcard_is_reached_through_loopback() -> None:
    assert Address("0.0.0.0", 1, 2, 3).reachable_host == "127.0.0.1"
    assert Address("192.0.2.7", 1, 2, 3).reachable_host == "192.0.2.7"
