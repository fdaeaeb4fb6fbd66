"""Results as a page: one row per fault, then remarks, and what the columns mean."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.environment import Provenance
from benchmarks.faults.load import Kind
from benchmarks.faults.trial import Result, Truth
from benchmarks.faults.watching import Slope
from benchmarks.figures import markdown_table

WORTH_TELLING = 1000
"""With fewer requests, a slope per 10,000 would mostly extrapolate the warm-up."""
MIB = 2**20
HEAD = (
    "fault",
    "sent",
    "right",
    "clear error",
    "lost",
    "wrong",
    "noticed",
    "recovered",
    "readiness true",
    "memory",
    "/dev/shm",
    "restarts",
)
LEGEND = """\
*Right* means exactly the mask that the healthy server gave; *clear error*, one of the client's
errors that say what to do, within the deadline; *lost*, no answer in time, or an outage that the
client should have hidden but did not; *wrong*, anything else. *Noticed* is the time from the fault
until the readiness probe failed (–: it never did), *recovered* the time from the end of the fault
until callers got only right answers. *Readiness true* counts the probe's verdicts that agree with
the outcomes of the requests around them. Memory is what the server's processes do not share: its
slope per 10,000 requests ± standard error or, if the last server saw fewer than 1,000 requests, its
growth and their number, including the warm-up (–: fewer than 100, or the server had been replaced
by then). The suite emulates the container's restart policy (0.1 s, doubling). The watch of process
1 checks every second (in the image, every 30 s, so recovery from a dead or stuck model takes that
much longer), and three consecutive failures stop the server."""


def page(title: str, results: Sequence[Result], origin: Provenance) -> str:
    """The section in Markdown."""
    ran = [result for result in results if not result.skipped]
    skipped = [f"- {one.name}: not run, {one.skipped}" for one in results if one.skipped]
    remarks = [f"- {one.name}: {one.remark}" for one in ran if one.remark]
    total = {kind: sum(one.counts.get(kind, 0) for one in ran) for kind in Kind}
    summary = ", ".join(f"{count:,} {kind.value}" for kind, count in total.items())
    parts = [
        f"## {title}",
        origin.markdown(),
        f"{sum(total.values()):,} requests under {len(ran)} faults: {summary}.",
        table(ran),
        "\n".join([*remarks, *skipped]),
        LEGEND,
    ]
    return "\n\n".join(part for part in parts if part)


def table(results: Sequence[Result]) -> str:
    """One row per fault."""
    return markdown_table(HEAD, [_row(result) for result in results])


def _row(result: Result) -> tuple[str, ...]:
    kinds = (Kind.RIGHT, Kind.CLEAR, Kind.LOST, Kind.WRONG)
    return (
        result.name,
        f"{result.sent:,}",
        *(f"{result.counts.get(kind, 0):,}" for kind in kinds),
        _seconds(result.noticed),
        "never" if result.never_recovered else _seconds(result.recovered),
        _truth(result.truth),
        _slope(result.private),
        _slope(result.shm),
        str(result.restarts),
    )


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} s"


def _truth(truth: Truth | None) -> str:
    if truth is None:
        return "–"
    false = []
    if truth.falsely_ready:
        false.append(f"{truth.falsely_ready} falsely yes")
    if truth.falsely_unready:
        false.append(f"{truth.falsely_unready} falsely no")
    right = truth.verdicts - truth.falsely_ready - truth.falsely_unready
    return f"{right} of {truth.verdicts}" + (f" ({', '.join(false)})" if false else "")


def _slope(slope: Slope | None) -> str:
    if slope is None:
        return "–"
    if slope.requests < WORTH_TELLING:
        return f"{slope.growth * slope.requests / 1e4 / MIB:+.0f} MiB in {slope.requests}"
    return f"{slope.growth / MIB:+.1f} ± {slope.error / MIB:.1f} MiB"
