"""Counting of the fault suite, and one fault of it against a real server."""

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from benchmarks.environment import Provenance
from benchmarks.faults import processes, report, scenarios
from benchmarks.faults.bench import Bench
from benchmarks.faults.load import Caller, Kind, Load, Outcome, judge, observe, questions
from benchmarks.faults.relay import Relay
from benchmarks.faults.resources import removing_regions
from benchmarks.faults.stand import variant
from benchmarks.faults.trial import Result, Truth, last_trouble, truth
from benchmarks.faults.watching import Size, Slope, Verdict, slope
from export.repository import DECODER, read_config
from server import TritonServer
from triton_sam3 import Client, DeadlineExceeded, Overloaded, ServerError, ServerUnreachable

MASK = np.eye(3, dtype=bool)


def outcomes(kinds: str, start: float = 0.0) -> list[Outcome]:
    """One a second: r(ight), c(lear), l(ost), w(rong), or nothing for a blank."""
    named = {"r": Kind.RIGHT, "c": Kind.CLEAR, "l": Kind.LOST, "w": Kind.WRONG}
    return [
        Outcome(start + i, start + i + 0.5, named[kind])
        for i, kind in enumerate(kinds)
        if kind != " "
    ]


@pytest.mark.parametrize(
    ("answer", "seconds", "kind"),
    [
        (MASK.copy(), 1.0, Kind.RIGHT),
        (~MASK, 1.0, Kind.WRONG),
        (MASK[:2], 1.0, Kind.WRONG),
        (MASK.copy(), 99.0, Kind.LOST),
        (Overloaded("later"), 1.0, Kind.CLEAR),
        (DeadlineExceeded("late"), 5.5, Kind.CLEAR),
        (DeadlineExceeded("late"), 99.0, Kind.LOST),
        (ServerError("something"), 1.0, Kind.WRONG),
        (KeyError("a bug"), 1.0, Kind.WRONG),
        (ServerUnreachable("gone"), 1.0, Kind.LOST),
    ],
)
def test_what_becomes_of_a_request(answer: object, seconds: float, kind: Kind) -> None:
    hidden = (ServerUnreachable,)
    assert judge(answer, MASK, seconds, 5.0, hidden) is kind  # type: ignore[arg-type]


def test_an_unreachable_server_is_a_clear_error_where_nothing_could_hide_it() -> None:
    assert judge(ServerUnreachable("gone"), MASK, 1.0, 5.0) is Kind.CLEAR


def test_an_error_of_nobody_is_wrong_and_told() -> None:
    def ask() -> None:
        raise ZeroDivisionError("oh")

    outcome = observe(ask, MASK, 5.0)  # type: ignore[arg-type]
    assert outcome.kind is Kind.WRONG
    assert "ZeroDivisionError: oh" in outcome.said


@pytest.mark.parametrize(
    ("kinds", "trouble"),
    [
        ("rrrrrrrr", 2.0),  # the fault itself
        ("rrrcrrrr", 3.5),
        ("rrrc rrc", 7.5),
        ("rrrr   r", 7.5),  # nobody failed, nobody was answered
        ("rrrrcc", 8.0),  # it goes on
    ],
)
def test_when_an_outage_was_last_seen(kinds: str, trouble: float) -> None:
    assert last_trouble(outcomes(kinds), 2.0, 8.0) == pytest.approx(trouble, abs=1e-3)


def verdicts(*times: float, ready: bool) -> list[Verdict]:
    return [Verdict(time - 0.1, time, ready, "") for time in times]


def test_readiness_lies_when_it_says_yes_and_nobody_is_answered() -> None:
    seen = outcomes("rrccccrr")
    assert truth(verdicts(1.5, 4.0, 7.5, ready=True), seen) == Truth(3, 1, 0)
    assert truth(verdicts(4.0, ready=False), seen) == Truth(1, 0, 0)


def test_readiness_lies_when_it_says_no_and_all_are_answered() -> None:
    seen = [Outcome(i / 10, i / 10 + 0.05, Kind.RIGHT) for i in range(50)]
    assert truth(verdicts(2.0, ready=False), seen) == Truth(1, 0, 1)
    assert truth(verdicts(2.0, ready=True), seen) == Truth(1, 0, 0)


def test_slopes_are_of_the_last_server_alone() -> None:
    old = [Size(1, n, 10**9, 0) for n in range(0, 1000, 50)]
    new = [Size(2, n, 5 * n + n % 7, 4096) for n in range(1000, 3000, 50)]
    found = slope([*old, *new], lambda size: size.private)
    assert found is not None
    assert found.growth == pytest.approx(5e4, rel=0.01)
    assert 0 < found.error < 1000
    assert found.requests == 1950
    flat = slope([*old, *new], lambda size: size.shm)
    assert flat is not None
    assert flat.growth == pytest.approx(0)
    assert slope([*old, *new[:3]], lambda size: size.private) is None


def test_a_variant_bounds_kept_images_in_its_copy_alone(repository: Path, tmp_path: Path) -> None:
    before = read_config(repository, DECODER)
    copy = variant(repository, tmp_path, 12345)
    assert read_config(repository, DECODER) == before
    changed = read_config(copy, DECODER)
    assert changed.parameters["kept_images_bytes"].string_value == "12345"
    changed.parameters["kept_images_bytes"].CopyFrom(before.parameters["kept_images_bytes"])
    assert changed == before
    (copy / DECODER / "config.pbtxt").write_text("")
    with pytest.raises(ValueError, match="does not bound kept images"):
        variant(copy, tmp_path / "other", 12345)


@contextmanager
def echo() -> Iterator[int]:
    """A port that answers each connection's first bytes with themselves."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                connection.sendall(connection.recv(100))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield int(listener.getsockname()[1])
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_the_relay_passes_on_cuts_and_refuses() -> None:
    with echo() as port, Relay(port) as relay:
        with socket.create_connection(("127.0.0.1", relay.port), 5) as caller:
            caller.sendall(b"hello")
            assert caller.recv(100) == b"hello"
            relay.reset_all()
            with pytest.raises(ConnectionResetError):
                assert caller.recv(100) != b""
        assert relay.cut == 1
        relay.refuse(True)
        with socket.create_connection(("127.0.0.1", relay.port), 5) as caller:
            caller.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert caller.recv(100).startswith(b"HTTP/1.1 502 ")


def test_a_page_has_a_row_a_fault_and_says_what_was_not_run() -> None:
    counts = {Kind.RIGHT: 1200, Kind.CLEAR: 3, Kind.LOST: 0, Kind.WRONG: 0}
    growth = Slope(2**20, 2**19, 5000)
    results = [
        Result("a", counts, 0.5, 9.25, Truth(10, 1, 0), growth, Slope(2**20, 0, 500), 1, "words"),
        Result("b", skipped="needs a GPU"),
    ]
    origin = Provenance("make faults", "abc", "machine", "versions", "0.1")
    text = report.page("Faults", results, origin)
    row = next(line for line in text.splitlines() if line.startswith("| a "))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:6] == ["a", "1,203", "1,200", "3", "0", "0"]
    assert cells[6:9] == ["0.5 s", "9.2 s", "9 of 10 (1 falsely yes)"]
    assert cells[9:] == ["+1.0 ± 0.5 MiB", "+0 MiB in 500", "1"]
    assert "- a: words" in text
    assert "- b: not run, needs a GPU" in text
    assert "1,203 requests under 1 faults" in text


def test_every_fault_has_a_name_of_its_own() -> None:
    names = [fault.name for fault in scenarios.every()]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch("[a-z0-9-]+", name) for name in names)


def test_the_load_would_notice_a_mix_up(server: TritonServer) -> None:
    """With another picture's mask for the right one."""
    with Client(server.grpc_url) as client:
        asked = questions(client, 2)
    swapped = [type(asked[0])(asked[0].image, asked[0].point, asked[1].mask)]
    with Load([Caller(server.grpc_url)], asked) as healthy:
        healthy.settle()
    with Load([Caller(server.grpc_url)], swapped) as load, pytest.raises(RuntimeError):
        load.settle(within=1.0)
    assert {one.kind for one in healthy.outcomes} == {Kind.RIGHT}
    assert {one.kind for one in load.outcomes} == {Kind.WRONG}


def test_a_killed_decoder_is_brought_back(repository: Path, tmp_path: Path) -> None:
    with Bench(repository, tmp_path) as bench:
        result = processes.killed("sam3_prompt_decoder", bench, "decoder killed")
        family = bench.stand().container.descendants()
    assert result.counts[Kind.LOST] == result.counts[Kind.WRONG] == 0
    assert result.counts[Kind.RIGHT] >= 9
    assert result.counts[Kind.CLEAR] > 0
    assert result.restarts == 1
    assert result.noticed is not None
    assert result.recovered is not None
    assert family
    assert not any(process.runs for process in family)  # nothing is left behind


def test_what_libfaketime_leaves_is_taken_away_and_nothing_of_others(tmp_path: Path) -> None:
    (tmp_path / "faketime_shm_1").touch()
    with pytest.raises(KeyboardInterrupt), removing_regions(tmp_path):
        for name in ("faketime_shm_2", "sem.faketime_sem_2", "psm_3"):
            (tmp_path / name).touch()
        raise KeyboardInterrupt
    assert {path.name for path in tmp_path.iterdir()} == {"faketime_shm_1", "psm_3"}
