"""Take the server out of service: a file that the readiness probe sees, and time to notice it.

The age of the file, not who created it, decides how long is left to wait: Kubernetes' preStop hook
and the SIGTERM that follows it wait only once between them.
"""

import time
from pathlib import Path


def mark(path: Path) -> None:
    """Mark the server as draining; an existing mark is left as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.touch()


def remaining(path: Path, seconds: float) -> float:
    """Seconds until the mark is `seconds` old, never more than that even if the clock steps."""
    return min(seconds, max(0.0, path.stat().st_mtime + seconds - time.time()))
