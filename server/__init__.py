"""A model repository under a real tritonserver, without Docker.

    with TritonServer(Path("build/models")) as server:
        print(server.grpc_url)

`python -m server build/models` does the same on the command line. For development and tests: the
server in nvidia-pytriton is old (2.51), so it listens on loopback unless told otherwise.
"""

from server.errors import (
    PortInUseError,
    RepositoryError,
    ServerError,
    SetupError,
    StartError,
    TritonNotFoundError,
)
from server.triton import TritonServer

__all__ = [
    "PortInUseError",
    "RepositoryError",
    "ServerError",
    "SetupError",
    "StartError",
    "TritonNotFoundError",
    "TritonServer",
]
