"""What can go wrong when a server is started.

ServerError
├── SetupError            the call cannot work as it is: nothing was started (exit status 2)
│   ├── TritonNotFoundError
│   ├── RepositoryError
│   └── PortInUseError
└── StartError            tritonserver was started and did not come up (exit status 1)
"""


class ServerError(Exception):
    """Base of everything this package raises on purpose; the message is for people."""


class SetupError(ServerError):
    """Something the caller can correct before anything is started."""


class TritonNotFoundError(SetupError):
    """No tritonserver that can run here."""


class RepositoryError(SetupError):
    """The model repository is missing or is not one."""


class PortInUseError(SetupError):
    """A requested port cannot be bound on the requested address."""


class StartError(ServerError):
    """tritonserver ended, failed its canary or was not ready in time."""
