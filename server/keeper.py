"""The process between a `TritonServer` and its tritonserver, so that nothing is left running.

    caller ── keeper ── tritonserver ── Python stubs (one per model instance)

When Triton is killed, it leaves its stubs and their shared memory behind, and when the caller is
killed, nothing stops Triton. So the keeper is the parent: it stops all processes when it gets a
signal, when tritonserver exits on its own, and when the caller disappears. Then it removes the
shared memory and the temporary folder. `spawn` runs this file as a plain script with only the
standard library, so that it starts at once and cannot fail because of the caller's environment.

SIGTERM, SIGINT, SIGHUP   let tritonserver finish, at most `--grace` seconds, then kill
SIGUSR1                   kill at once
"""

import argparse
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

SHARED_MEMORY = Path("/dev/shm")
GRACEFUL = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
WATCHED = {*GRACEFUL, signal.SIGUSR1, signal.SIGCHLD}
CALLER_CHECK_SECONDS = 0.25
CANNOT_EXECUTE = 126  # as in a shell
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def spawn(
    command: Sequence[str],
    *,
    shm_prefix: str,
    work_dir: Path,
    grace: float,
    output: IO[bytes] | int,
    environment: Mapping[str, str],
) -> tuple["subprocess.Popen[str]", IO[str]]:
    """Start a keeper of `command` for the calling process.

    work_dir: the working directory of both, removed in the end; grace: seconds, as in `--grace`;
    output: where all output goes, as for `subprocess.Popen`.
    Returns the keeper and its report, to be read to the end: the process id of `command`, or
    nothing if it could not be executed.
    """
    read_end, write_end = os.pipe()
    try:
        process = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", str(Path(__file__).resolve())),
                f"--caller={os.getpid()}",
                f"--grace={grace}",
                f"--shm-prefix={shm_prefix}",
                f"--work-dir={work_dir}",
                f"--report-fd={write_end}",
                *("--", *command),
            ],
            cwd=work_dir,  # the stubs put it first on sys.path: it must be empty
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            pass_fds=(write_end,),
            start_new_session=True,  # Ctrl-C in a terminal is the caller's to handle
        )
    except BaseException:
        os.close(read_end)
        raise
    finally:
        os.close(write_end)
    return process, os.fdopen(read_end)


def remove_leftovers(shm_prefix: str, work_dir: Path) -> None:
    """Delete every shared memory region that starts with `shm_prefix`, and `work_dir`."""
    for region in SHARED_MEMORY.glob(f"{shm_prefix}*"):
        region.unlink(missing_ok=True)
    shutil.rmtree(work_dir, ignore_errors=True)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _start(command: Sequence[str]) -> "subprocess.Popen[bytes]":
    keeper = os.getpid()

    def in_child() -> None:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper:  # killed before the line above took effect
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)

    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=in_child,  # noqa: PLW1509 - this process has one thread
    )


def _has_exited(pid: int) -> bool:
    """Reap orphans; return whether `pid` exited, leaving it unreaped so that its id stays taken."""
    while True:
        exited = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if exited is None:
            return False
        if exited.si_pid == pid:
            return True
        os.waitpid(exited.si_pid, 0)


def _watch(pid: int, caller: int, grace: float) -> None:
    """Return when tritonserver has exited or must be killed."""
    deadline = None
    while not _has_exited(pid) and os.getppid() == caller:
        received = signal.sigtimedwait(WATCHED, CALLER_CHECK_SECONDS)
        if received is not None and received.si_signo == signal.SIGUSR1:
            return
        if received is not None and received.si_signo in GRACEFUL and deadline is None:
            deadline = time.monotonic() + grace
            os.kill(pid, signal.SIGTERM)
        if deadline is not None and time.monotonic() > deadline:
            return


def _children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def _kill_family(server: "subprocess.Popen[bytes]") -> None:
    """Kill tritonserver's process group, then its orphans, which the subreaper inherits."""
    os.killpg(server.pid, signal.SIGKILL)  # not reaped yet, so the id cannot have been reused
    server.wait()
    while orphans := _children():
        for pid in orphans:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _keep(command: Sequence[str], report_fd: int, caller: int, grace: float) -> int:
    """Run `command`, report its process id and return its exit status as a shell would."""
    try:
        server = _start(command)
    except OSError as error:
        print(error, file=sys.stderr)
        return CANNOT_EXECUTE
    try:
        with os.fdopen(report_fd, "w") as report:
            report.write(str(server.pid))
        _watch(server.pid, caller, grace)
    finally:
        _kill_family(server)
    return server.returncode if server.returncode >= 0 else 128 - server.returncode


def main() -> int:
    """Run and watch one command as given by the arguments, and clean up after it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--caller", type=int, required=True)
    parser.add_argument("--grace", type=float, required=True)
    parser.add_argument("--shm-prefix", required=True)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--report-fd", type=int, required=True)
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()

    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        return _keep(args.command, args.report_fd, args.caller, args.grace)
    finally:
        remove_leftovers(args.shm_prefix, args.work_dir)


if __name__ == "__main__":
    sys.exit(main())
