"""The file that marks a server as draining."""

import os
import time
from pathlib import Path

from docker.entrypoint import drain
from docker.entrypoint.__main__ import main


def test_a_second_drain_waits_only_for_the_remaining_time(tmp_path: Path) -> None:
    mark = tmp_path / "below" / "draining"
    drain.mark(mark)
    first = mark.stat().st_mtime_ns
    drain.mark(mark)
    assert mark.stat().st_mtime_ns == first
    assert 0 < drain.remaining(mark, 60) <= 60
    assert drain.remaining(mark, 0) == 0


def test_a_clock_that_steps_back_does_not_prolong_the_drain(tmp_path: Path) -> None:
    mark = tmp_path / "draining"
    drain.mark(mark)
    made_later = time.time() + 3600
    os.utime(mark, (made_later, made_later))
    assert drain.remaining(mark, 5) == 5


def test_the_hook_returns_once_proxies_have_had_time_to_notice(tmp_path: Path) -> None:
    mark = tmp_path / "draining"
    assert main(["drain", f"--drain-mark={mark}", "--drain-seconds=0.3"]) == 0
    assert time.time() - mark.stat().st_mtime >= 0.3
