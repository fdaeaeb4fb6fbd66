"""Taking the server out of service: a file that the readiness probe sees, and time to be seen.

The file's age, not who made it, decides how long is still to be waited: Kubernetes' preStop hook
and the SIGTERM that follows it wait once between them.
"""

import time
from pathlib import Path


def mark(path: Path) -> None:
    """Say that the server is being drained; an earlier mark stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.touch()


def remaining(path: Path, seconds: float) -> float:
    """Seconds still to wait until the mark is `seconds` old, whatever the clock does meanwhile."""
    return min(seconds, max(0.0, path.stat().st_mtime + seconds - time.time()))
