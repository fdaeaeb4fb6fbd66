"""A running tritonserver with its parent, the keeper, and its children, the stubs."""

import os
import re
import secrets
import signal
import subprocess
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from server import installation, keeper
from server.command import ENVIRONMENT, EXIT_TIMEOUT_SECONDS, Address, command_line
from server.errors import SetupError, StartError

GRACE_SECONDS = EXIT_TIMEOUT_SECONDS + 5.0
KEEPER_SECONDS = 5.0
_SAFE_PATH = re.compile(r"[\w./+-]+", re.ASCII)


class Family:
    """Starts all processes on creation; `stop` must be called, and may be called repeatedly.

    Raises SetupError if there is no tritonserver, StartError if it cannot be executed.
    """

    def __init__(
        self,
        repository: Path,
        address: Address,
        *,
        extra_args: Sequence[str],
        env: Mapping[str, str],
        log: Path | None,
    ) -> None:
        self.pid = 0
        self._shm_prefix = f"triton_sam3_{secrets.token_hex(6)}_"
        self._keeper: subprocess.Popen[str] | None = None
        self._log: BinaryIO = _open_log(log)
        weakref.finalize(self, self._log.close)  # still readable after `stop`
        self._log_start = self._log.seek(0, os.SEEK_END)
        self._work_dir = _make_work_dir()
        self._repository = repository.resolve()
        try:
            self._start(address, extra_args, {**os.environ, **env})
        except BaseException:
            self.stop(signal.SIGUSR1)
            raise

    def returncode(self) -> int | None:
        """None while any of the processes runs, then tritonserver's exit status."""
        return None if self._keeper is None else self._keeper.poll()

    def wait(self) -> int:
        """Block until tritonserver exits on its own and return its exit status."""
        return 0 if self._keeper is None else self._keeper.wait()

    def read_log(self) -> str:
        """The output of this server and its stubs so far."""
        size = os.fstat(self._log.fileno()).st_size
        start = self._log_start if self._log_start <= size else 0  # 0: somebody truncated it
        text = os.pread(self._log.fileno(), size - start, start).decode(errors="replace")
        return text.replace(str(self._work_dir / "models"), str(self._repository))

    def stop(self, signal_number: int) -> None:
        """Send the keeper one of its signals, wait for it, and clean up if it was killed."""
        if self._keeper is not None:
            self._keeper.send_signal(signal_number)
            try:
                self._keeper.wait(GRACE_SECONDS + KEEPER_SECONDS)
            except subprocess.TimeoutExpired:
                self._keeper.kill()
            if self._keeper.wait() < 0 and self.pid:
                with suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
        keeper.remove_leftovers(self._shm_prefix, self._work_dir)

    def _start(
        self, address: Address, extra_args: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        found = installation.find(self._work_dir, environment)
        command = command_line(
            found.executable,
            self._safe_repository(),
            address,
            shm_prefix=self._shm_prefix,
            backend_directory=found.backend_directory,
            extra_args=extra_args,
        )
        self._start_keeper(command, {**ENVIRONMENT, **environment, **found.environment})

    def _safe_repository(self) -> Path:
        """A shell-safe path: Triton 2.51 puts a model's path into a shell command, unquoted."""
        if _SAFE_PATH.fullmatch(str(self._repository)):
            return self._repository
        link = self._work_dir / "models"
        link.symlink_to(self._repository, target_is_directory=True)
        return link

    def _start_keeper(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._keeper, report = keeper.spawn(
            command,
            shm_prefix=self._shm_prefix,
            work_dir=self._work_dir,
            grace=GRACE_SECONDS,
            output=self._log,
            environment=environment,
        )
        with report:
            pid = report.read()
        if not pid:
            raise StartError(f"tritonserver could not be executed:\n{self.read_log()}")
        self.pid = int(pid)


def _open_log(path: Path | None) -> BinaryIO:
    if path is None:
        return tempfile.TemporaryFile("a+b")
    try:
        return path.open("a+b")
    except OSError as error:
        raise SetupError(f"Cannot write the log to {path}: {error.strerror}.") from error


def _make_work_dir() -> Path:
    default = tempfile.gettempdir()
    parent = default if _SAFE_PATH.fullmatch(default) else "/tmp"  # as for the repository
    return Path(tempfile.mkdtemp(prefix="triton-sam3-server-", dir=parent)).resolve()
