"""The results page's section for one run."""

from __future__ import annotations

from collections import Counter

from benchmarks.environment import Provenance
from benchmarks.figures import markdown_table
from benchmarks.fuzz.judge import ANSWERED, DISCONNECTED, FINDING, FRONTEND_ERROR, REJECTED
from benchmarks.fuzz.octets import GRPC, HTTP
from benchmarks.fuzz.run import CANARY_EVERY, CLICK_EVERY, WARM_UP, Outcome

COLUMNS = (ANSWERED, REJECTED, DISCONNECTED, FRONTEND_ERROR, FINDING)
HEADER = (
    "kind", "protocol", "sent", "valid result", "rejected with a message", "connection closed",
    "Triton's own error", "findings",
)  # fmt: skip
EXCLUDED = """\
Excluded from the run, because each crashes tritonserver 2.51 itself or its decoder before any of
our code sees it (SECURITY.md): a shape whose elements overflow 64 bits, a shape of a hundred
gigabytes with values in JSON, the parameter `classification` on an output of strings, JSON nested
100,000 levels deep, a million chunks in one body, and compression bombs."""


def markdown(outcome: Outcome, origin: Provenance) -> str:
    """The section of RESULTS.md."""
    sent = sum(outcome.tally.total.values())
    in_warm_up = outcome.warm_up.total[FINDING]
    of_them = f", {in_warm_up} of them in the warm-up" if in_warm_up else ""
    return "\n\n".join(
        (
            "## Fuzzing the served models",
            origin.markdown(),
            f"{sent:,} requests after a warm-up of {WARM_UP:,}, to all models that callers "
            "use, with the demo model: half are valid requests with faults injected by hypothesis, "
            "half are valid requests with mutated octets; both run concurrently, one request of "
            "each in flight. Every answer is checked: either the shapes, types and ranges of the "
            "outputs, or that it is a client error whose message names no path, address or shared "
            f"memory. **Findings: {outcome.findings}{of_them}.**",
            _server(outcome),
            markdown_table(_growth_header(outcome), _growth(outcome)),
            "Triton's own frontend answers some requests with a server error, or without a "
            "message, before any model sees them:",
            markdown_table(("what", "protocol", "count"), _frontend_errors(outcome)),
            EXCLUDED,
            markdown_table(HEADER, _rows(outcome)),
        )
    )


def _server(outcome: Outcome) -> str:
    processes = len(outcome.marks[0].processes)
    kept = "the same throughout" if outcome.same_processes else "NOT the same at the end"
    return (
        f"The server's {processes} processes were {kept}. The canary, a drawn disc asked for by "
        f"click every {CLICK_EVERY} requests and by file every {CANARY_EVERY}, has "
        f"IoU {outcome.iou:.2f} with the drawing; its mask was identical to the bit each time."
    )


def _growth_header(outcome: Outcome) -> list[str]:
    each = outcome.requests // max(1, len(outcome.marks) - 1)
    marks = [f"after {each * i:,}" for i in range(1, len(outcome.marks))]
    return ["MiB", "after the warm-up", *marks, "per 10,000 requests"]


def _growth(outcome: Outcome) -> list[list[str]]:
    """Each measure's value at every mark, in MiB, and its growth."""
    curves = {
        "resident memory of all processes": [mark.resident for mark in outcome.marks],
        "`/dev/shm`": [mark.shared for mark in outcome.marks],
    }
    for part in sorted(outcome.marks[0].parts):
        values = [mark.parts.get(part, 0) for mark in outcome.marks]
        curves[f"{part}, unshared"] = values
    return [_growth_row(name, values, outcome.requests) for name, values in curves.items()]


def _growth_row(name: str, values: list[int], requests: int) -> list[str]:
    sizes = [value / 2**20 for value in values]
    growth = (sizes[-1] - sizes[0]) / requests * 10_000
    return [name, *(f"{size:.1f}" for size in sizes), f"{growth:+.1f}"]


def _frontend_errors(outcome: Outcome) -> list[list[str]]:
    return [
        [name, protocol, str(count)]
        for (name, protocol), count in sorted(outcome.tally.frontend_errors.items())
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
