"""What can go wrong when a server is started.

ServerError
├── SetupError            the call cannot work as given: nothing was started (exit status 2)
│   ├── TritonNotFoundError
│   ├── RepositoryError
│   └── PortInUseError
└── StartError            tritonserver was started but did not become ready (exit status 1)
"""


class ServerError(Exception):
    """Base class of the errors of this package; the message is meant for users."""


class SetupError(ServerError):
    """An error that the caller can fix; nothing was started."""


class TritonNotFoundError(SetupError):
    """There is no tritonserver that can run here."""


class RepositoryError(SetupError):
    """The model repository is missing or is not one."""


class PortInUseError(SetupError):
    """A requested port cannot be bound on the requested address."""


class StartError(ServerError):
    """tritonserver exited, failed its canary or was not ready in time."""
