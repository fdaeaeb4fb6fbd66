"""Log lines for collectors."""

import io
import json

from docker.entrypoint import logs


def test_a_line_of_triton_is_split_into_its_parts() -> None:
    line = '2026-01-31T12:00:00Z E 17 model.cc:12] "a \\"quoted\\" name\\nand a line"\n'
    assert json.loads(logs.record(line)) == {
        "time": "2026-01-31T12:00:00Z",
        "level": "error",
        "source": "model.cc:12",
        "message": 'a "quoted" name\nand a line',
    }


def test_an_unquoted_message_stays_as_it_is() -> None:
    assert json.loads(logs.record("2026-01-31T12:00:00Z I 1 a.cc:1] 12"))["message"] == "12"


def test_a_stubs_own_line_is_not_lost() -> None:
    written = json.loads(logs.record("Traceback (most recent call last):\n"))
    assert (written["source"], written["message"]) == (
        "output",
        "Traceback (most recent call last):",
    )


def test_no_tensor_fits_into_a_line() -> None:
    written = json.loads(logs.record("2026-01-31T12:00:00Z W 1 a.cc:1] " + "255, " * 100_000))
    assert len(written["message"]) < logs.MAX_MESSAGE + 50
    assert "500000 characters" in written["message"] or "499999" in written["message"]


def test_each_line_becomes_one_and_blank_ones_are_dropped() -> None:
    out = io.StringIO()
    logs.translate(["one\n", "\n", "two\u2028three\n"], out)
    assert [json.loads(line)["message"] for line in out.getvalue().split("\n")[:-1]] == [
        "one",
        "two\u2028three",
    ]
