"""The fault suite's accounting, and one of its faults against a real server."""

import http.server
import re
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.environment import Provenance
from benchmarks.faults import files, processes, report, requests, scenarios
from benchmarks.faults.bench import Bench
from benchmarks.faults.load import Caller, Kind, Load, Outcome, answered_questions, judge, observe
from benchmarks.faults.relay import Relay
from benchmarks.faults.resources import removing_regions
from benchmarks.faults.scenarios import Fault
from benchmarks.faults.soak import Soak
from benchmarks.faults.stand import variant
from benchmarks.faults.trial import Result, Truth, last_trouble, truth
from benchmarks.faults.watching import Repeating, Size, Slope, Verdict, slope
from benchmarks.fuzz.census import is_alive
from export.repository import DECODER, read_config
from server import TritonServer
from triton_sam3 import Client, DeadlineExceeded, Overloaded, ServerError, ServerUnreachable

MASK = np.eye(3, dtype=bool)


def outcomes(kinds: str, start: float = 0.0) -> list[Outcome]:
    """One per second: r(ight), c(lear), l(ost), w(rong), or none for a blank."""
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
def test_the_outcome_of_a_request(answer: object, seconds: float, kind: Kind) -> None:
    hidden = (ServerUnreachable,)
    assert judge(answer, MASK, seconds, 5.0, hidden) is kind  # type: ignore[arg-type]


def test_an_unreachable_server_is_a_clear_error_where_nothing_could_hide_it() -> None:
    assert judge(ServerUnreachable("gone"), MASK, 1.0, 5.0) is Kind.CLEAR


def test_an_unexpected_error_is_wrong_and_reported() -> None:
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
        ("rrrr   r", 7.5),  # no request failed, and none was answered
        ("rrrrcc", 8.0),  # it is still going on
    ],
)
def test_the_last_trouble_of_an_outage(kinds: str, trouble: float) -> None:
    assert last_trouble(outcomes(kinds), 2.0, 8.0) == pytest.approx(trouble, abs=1e-3)


def verdicts(*times: float, ready: bool) -> list[Verdict]:
    return [Verdict(time - 0.1, time, ready) for time in times]


def test_readiness_is_wrong_if_it_is_true_and_no_request_is_answered() -> None:
    seen = outcomes("rrccccrr")
    assert truth(verdicts(1.5, 4.0, 7.5, ready=True), seen) == Truth(3, 1, 0)
    assert truth(verdicts(4.0, ready=False), seen) == Truth(1, 0, 0)


def test_readiness_is_wrong_if_it_is_true_while_requests_hang() -> None:
    hung = [Outcome(0.0, 9.0, Kind.CLEAR)]
    assert truth(verdicts(4.0, ready=True), hung) == Truth(1, 1, 0)
    slow = [*hung, Outcome(3.0, 4.1, Kind.RIGHT)]
    assert truth(verdicts(4.0, ready=True), slow) == Truth(1, 0, 0)


def test_readiness_is_wrong_if_it_is_false_and_all_requests_are_answered() -> None:
    seen = [Outcome(i / 10, i / 10 + 0.05, Kind.RIGHT) for i in range(50)]
    assert truth(verdicts(2.0, ready=False), seen) == Truth(1, 0, 1)
    assert truth(verdicts(2.0, ready=True), seen) == Truth(1, 0, 0)


@pytest.mark.parametrize(("growth", "grows"), [(0.5, False), (2.0, True)])
def test_a_soak_fails_where_memory_grows(growth: float, grows: bool) -> None:
    """MiB per 10,000 requests, in steps of pages."""
    sizes = [Size(1, n, int(growth * 2**20 * n / 1e4) & -4096, 4096) for n in range(0, 40_000, 500)]
    assert Soak(30.0, Counter(), sizes).grows is grows


def test_a_fault_without_recovery_fails() -> None:
    right = {Kind.RIGHT: 100}
    assert not Result("a", right, recovered=2.0).failed
    assert not Result("none was made", right).failed
    dead = Result("b", right, never_recovered=True)
    assert dead.failed
    assert "| never |" in report.table([dead])


def test_an_error_in_a_watcher_is_raised_at_the_end() -> None:
    """Otherwise nobody would notice that watching had stopped."""

    def look() -> None:
        raise OSError("reset by peer")

    with pytest.raises(OSError, match="reset by peer"), Repeating(look, 0.001):
        time.sleep(0.1)


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


def test_a_variant_limits_kept_images_only_in_its_own_copy(
    repository: Path, tmp_path: Path
) -> None:
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
    """A port that echoes each connection's first bytes."""
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


def test_the_relay_forwards_cuts_and_rejects() -> None:
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


def test_a_page_has_a_row_per_fault_and_says_what_was_not_run() -> None:
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


def test_a_fault_that_raises_fails_and_the_others_are_still_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(_: Bench, title: str) -> Result:
        raise LookupError(f"tritonserver is not running\n{title}")

    def succeed(_: Bench, title: str) -> Result:
        return Result(title, {Kind.RIGHT: 7})

    faults = [Fault("one", "the first", fail), Fault("two", "the second", succeed)]
    monkeypatch.setattr(scenarios, "every", lambda: faults)
    reported = []
    results = scenarios.run(tmp_path, [], lambda title, result: reported.append((title, result)))
    failed, succeeded = results
    assert failed.counts == {Kind.WRONG: 1}
    assert failed.remark == "LookupError: tritonserver is not running the first"
    assert succeeded.counts == {Kind.RIGHT: 7}
    assert [title for title, _ in reported] == ["the first"] * 2 + ["the second"] * 2


@pytest.mark.parametrize(
    ("kept", "words"),
    [([], "never tested"), ([0, 0], "never tested"), ([90, 101, 90], "101 bytes of images kept")],
)
def test_kept_images_beyond_their_limit_or_never_seen_are_a_failure(
    kept: list[int], words: str
) -> None:
    with pytest.raises(RuntimeError, match=words):
        requests.describe_kept(kept, 100)
    assert requests.describe_kept([90, 100], 100) == "at most 100 of 100 bytes kept"


@pytest.mark.parametrize(("name", "kept"), [("sam3_kept_images_bytes", 90), ("renamed", None)])
def test_only_reports_of_the_decoder_are_samples(name: str, kept: int | None) -> None:
    class Metrics(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f'{name}{{model="sam3_prompt_decoder"}} 90.0\n'.encode())

        def log_message(self, *_: object) -> None:
            pass

    samples: list[int] = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metrics) as metrics:
        threading.Thread(target=metrics.serve_forever, daemon=True).start()
        stand: Any = SimpleNamespace(
            container=SimpleNamespace(metrics_port=metrics.server_address[1])
        )
        requests._sample(stand, samples, 0.1)
        metrics.shutdown()
    assert samples == ([] if kept is None else [kept])


def test_a_rejected_export_says_nothing_about_readiness(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refused = subprocess.CompletedProcess((), 2, "", "This is a checkpoint of SAM 3.1.")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: refused)
    with Bench(tmp_path, tmp_path) as bench:
        result = files.wrong_generation(bench, "another generation")
    assert result.counts[Kind.CLEAR] == 1
    assert result.noticed is None
    assert result.remark == "exit status 2 after 0 s: This is a checkpoint of SAM 3.1."


def test_the_load_would_notice_a_mix_up(server: TritonServer) -> None:
    """With another picture's mask in place of the right one."""
    with Client(server.grpc_url) as client:
        questions = answered_questions(client, 2)
    swapped = [type(questions[0])(questions[0].image, questions[0].point, questions[1].mask)]
    with Load([Caller(server.grpc_url)], questions) as healthy:
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
    assert not any(is_alive(process.pid) for process in family)  # nothing is left behind


def test_only_the_leftovers_of_libfaketime_are_removed(tmp_path: Path) -> None:
    (tmp_path / "faketime_shm_1").touch()
    with pytest.raises(KeyboardInterrupt), removing_regions(tmp_path):
        for name in ("faketime_shm_2", "sem.faketime_sem_2", "psm_3"):
            (tmp_path / name).touch()
        raise KeyboardInterrupt
    assert {path.name for path in tmp_path.iterdir()} == {"faketime_shm_1", "psm_3"}
