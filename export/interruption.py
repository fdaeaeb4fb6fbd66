"""What ends a command early: Ctrl-C, SIGTERM and SIGHUP unwind it once, and its clean-up is left
alone."""

from __future__ import annotations

import signal
from typing import NoReturn

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def unwind_on_signals() -> None:
    """Raise KeyboardInterrupt at the first signal; what was ignored, as under nohup, stays so."""
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, unwind)


def unwind(*_: object) -> NoReturn:
    """Ignore further signals, which would interrupt the clean-up, and raise KeyboardInterrupt."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
