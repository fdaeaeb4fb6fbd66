"""The page's section of one run."""

from __future__ import annotations

from collections import Counter

from benchmarks.environment import Provenance
from benchmarks.figures import markdown_table
from benchmarks.fuzz.judge import ANSWERED, CUT, FINDING, IN_WORDS, SERVERS_OWN
from benchmarks.fuzz.octets import GRPC, HTTP
from benchmarks.fuzz.run import CANARY_EVERY, CLICK_EVERY, WARM_UP, Outcome

COLUMNS = (ANSWERED, IN_WORDS, CUT, SERVERS_OWN, FINDING)
HEADER = (
    "kind", "protocol", "sent", "valid result", "refused with a sentence", "connection closed",
    "Triton's own error", "findings",
)  # fmt: skip
EXCLUDED = """\
Kept out of the run, because each ends tritonserver 2.51 itself or its decoder before any code of
ours sees it (SECURITY.md): a shape whose elements overflow 64 bits, a shape of a hundred
gigabytes beside values in JSON, the parameter `classification` on an output of strings, JSON nested
100,000 deep, a million chunks in one body, and compressed bodies that swell."""


def markdown(outcome: Outcome, origin: Provenance) -> str:
    """The section as it stands in RESULTS.md."""
    sent = sum(outcome.tally.total.values())
    total = outcome.tally.total
    return "\n\n".join(
        (
            "## Fuzzing the served models",
            origin.markdown(),
            f"{sent:,} requests after a warm-up of {WARM_UP:,}, to all models that callers "
            "use, on the demo model: half are right ones with faults put in by hypothesis, half "
            "right ones whose octets are changed; both at once, one of each in flight. Every "
            "answer is checked: outputs' shapes, types and ranges, or a client's error with a "
            "sentence that names no path, address or shared memory. **Findings: "
            f"{total[FINDING]}.**",
            _server(outcome),
            markdown_table(_growth_header(outcome), _growth(outcome)),
            "Triton's own frontend answers some requests with a server's error, or in no words, "
            "before any model sees them:",
            markdown_table(("what", "protocol", "count"), _servers_own(outcome)),
            EXCLUDED,
            markdown_table(HEADER, _rows(outcome)),
        )
    )


def _server(outcome: Outcome) -> str:
    processes = len(outcome.marks[0].processes)
    kept = "the same to the end" if outcome.same_processes else "NOT the same at the end"
    return (
        f"The server's {processes} processes were {kept}. The canary, a drawn disc asked for by "
        f"click beside every {CLICK_EVERY} requests and by file beside every {CANARY_EVERY}, has "
        f"IoU {outcome.iou:.2f} with what was drawn; its mask was the same to the bit each time."
    )


def _growth_header(outcome: Outcome) -> list[str]:
    each = outcome.requests // max(1, len(outcome.marks) - 1)
    marks = [f"after {each * i:,}" for i in range(1, len(outcome.marks))]
    return ["MiB", "after the warm-up", *marks, "per 10,000 requests"]


def _growth(outcome: Outcome) -> list[list[str]]:
    """Of each measure its value at every mark, in MiB, and the growth."""
    curves = {
        "resident memory of all processes": [mark.resident for mark in outcome.marks],
        "`/dev/shm`": [mark.shared for mark in outcome.marks],
    }
    for part in sorted(outcome.marks[0].parts):
        values = [mark.parts.get(part, 0) for mark in outcome.marks]
        curves[f"{part}, shared with nobody"] = values
    return [_growth_row(name, values, outcome.requests) for name, values in curves.items()]


def _growth_row(name: str, values: list[int], requests: int) -> list[str]:
    sizes = [value / 2**20 for value in values]
    growth = (sizes[-1] - sizes[0]) / requests * 10_000
    return [name, *(f"{size:.1f}" for size in sizes), f"{growth:+.1f}"]


def _servers_own(outcome: Outcome) -> list[list[str]]:
    return [
        [name, protocol, str(count)]
        for (name, protocol), count in sorted(outcome.tally.servers_own.items())
    ]


def _rows(outcome: Outcome) -> list[list[str]]:
    octets = {*HTTP, *GRPC}
    rows = []
    for (kind, protocol), counts in sorted(
        outcome.tally.outcomes.items(), key=lambda item: (item[0][0] in octets, item[0])
    ):
        label = f"octets: {kind}" if kind in octets else kind
        rows.append(_row(label, protocol, counts))
    return [*rows, _row("**all**", "", outcome.tally.total)]


def _row(label: str, protocol: str, counts: Counter[str]) -> list[str]:
    return [label, protocol, *(str(n) for n in (counts.total(), *(counts[c] for c in COLUMNS)))]
