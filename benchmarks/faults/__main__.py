"""python -m benchmarks.faults: break the server in every way we know, and report what happens."""

from __future__ import annotations

import signal
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import artifacts
from benchmarks.environment import provenance
from benchmarks.faults import report, scenarios, soak
from benchmarks.faults.load import Kind
from benchmarks.faults.trial import Result
from benchmarks.results import write_section

console = Console(highlight=False, soft_wrap=True, log_path=False)
app = typer.Typer(invoke_without_command=True, add_completion=False)


@app.callback()
def faults(
    context: typer.Context,
    only: Annotated[
        list[str] | None, typer.Option(help="Run one fault by name; repeatable; not written.")
    ] = None,
    write: Annotated[bool, typer.Option(help="Rewrite RESULTS.md's section.")] = True,
) -> None:
    """Run every fault, one after another.

    Exit status 1 if a request was lost or answered wrongly, the server never recovered, or a fault
    could not be judged.
    """
    if context.invoked_subcommand:
        return
    names = only or []
    known = [fault.name for fault in scenarios.every()]
    if unknown := sorted(set(names) - set(known)):
        raise typer.BadParameter(f"unknown: {', '.join(unknown)}; faults are {', '.join(known)}")
    origin = provenance("make faults")
    results = scenarios.run(artifacts.demo().repository, names, _tell)
    console.print(report.table([one for one in results if not one.skipped]), markup=False)
    if write and not names:
        write_section("faults", report.page("Faults", results, origin))
    raise typer.Exit(1 if any(one.failed for one in results) else 0)


@app.command("soak")
def soak_command(
    minutes: Annotated[float, typer.Option(help="How long.")] = 30.0,
    write: Annotated[bool, typer.Option(help="Rewrite RESULTS.md's section.")] = True,
) -> None:
    """Run load of every kind for a long time.

    Exit status 1 if a request was lost or answered wrongly, or memory did not stay flat.
    """
    command = "make soak" if minutes == 30 else f"make soak MINUTES={minutes:g}"
    origin = provenance(command)
    found = soak.run(artifacts.demo().repository, minutes)
    console.print(found.page(origin), markup=False)
    if write:
        write_section("soak", found.page(origin))
    bad = found.counts[Kind.LOST] + found.counts[Kind.WRONG]
    raise typer.Exit(1 if bad or found.grows else 0)


def _tell(title: str, result: Result | None) -> None:
    """Print a line when a fault starts, and its result when it is over."""
    if result is None:
        console.log(title)
        return
    counts = ", ".join(f"{count} {kind.value}" for kind, count in result.counts.items())
    console.print(f"      {result.skipped or counts}")
    if result.remark:
        console.print(f"      {result.remark}", markup=False)
    for said, count in result.errors[:6]:
        console.print(f"      {count} × {said[:200]}", markup=False, style="dim")


if __name__ == "__main__":
    # Like Ctrl-C, they unwind the stack, so that no server is left running.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    app()
