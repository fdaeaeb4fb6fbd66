"""tritonserver's output as JSON lines for any collector: one object per line, messages truncated.

{"time": "2026-01-31T12:00:00Z", "level": "error", "source": "model.cc:12", "message": "…"}
"""

import json
import re
from collections.abc import Iterable
from datetime import datetime, timezone
from typing import TextIO

MAX_MESSAGE = 2000
"""Characters kept of a message: no tensor ever fits into a log line."""

_LEVELS = {"I": "info", "W": "warning", "E": "error", "F": "fatal"}
_TRITON = re.compile(
    r"(?P<time>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ) (?P<level>[IWEF]) \d+ (?P<source>[^\]\s]+)\] "
    r"(?P<message>.*)"
)


def translate(lines: Iterable[str], out: TextIO) -> None:
    """Write every non-empty line as JSON."""
    for line in lines:
        if line.strip():
            write(record(line), out)


def write(line: str, out: TextIO) -> None:
    """Write the line in one call: two threads write here."""
    out.write(line + "\n")
    out.flush()


def record(line: str) -> str:
    """Convert a line of `--log-format=ISO8601`, or whatever a stub prints, to a JSON object."""
    match = _TRITON.match(line)
    if match is None:
        return event("output", line.rstrip())
    return _object(
        match["time"], _LEVELS[match["level"]], match["source"], _unquoted(match["message"])
    )


def is_error(line: str) -> bool:
    """Whether Triton wrote the line at level error or fatal."""
    match = _TRITON.match(line)
    return match is not None and match["level"] in "EF"


def event(source: str, message: str, level: str = "info") -> str:
    """A log line of our own, with the current time."""
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return _object(now, level, source, message)


def _object(time: str, level: str, source: str, message: str) -> str:
    if len(message) > MAX_MESSAGE:
        message = f"{message[:MAX_MESSAGE]}… ({len(message)} characters)"
    return json.dumps(
        {"time": time, "level": level, "source": source, "message": message}, ensure_ascii=False
    )


def _unquoted(message: str) -> str:
    """Decode the message: Triton writes most as JSON strings, and a few unquoted."""
    try:
        text = json.loads(message)
    except ValueError:
        return message
    return text if isinstance(text, str) else message
