"""`python -m paper_checks [--only ID …] [--list] [--check] [--json FILE] [--report FILE]`."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from experiments.lib.files import write_atomically
from paper_checks.framework import Claim, Outcome, report
from paper_checks.framework.registry import registry, select
from paper_checks.framework.runner import run_all


@dataclasses.dataclass(frozen=True)
class Config:
    """Run the paper's statements as claims; exit with status 1 if one fails."""

    only: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Ids to run; "thm-1" selects all of Theorem 1. May be repeated; by default all claims run."""
    list: bool = False
    """Print ids and statements; run nothing."""
    json: Path | None = None
    """Write the outcomes to this file."""
    report: Path | None = None
    """Write the report to this file, as Markdown."""
    check: bool = False
    """Also fail if the committed report differs from what the code gives, and print the lines."""
    workers: int = 2
    """The number of processes."""


def _number(value: float) -> float | str:
    """Return a number that JSON can hold."""
    return value if math.isfinite(value) else str(value)  # JSON has no inf and no nan


def as_record(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome as --json writes it."""
    return {
        "id": outcome.claim.id,
        "source": outcome.claim.source,
        "statement": outcome.claim.statement,
        "measured": _number(outcome.check.measured),
        "bound": _number(outcome.check.bound),
        "control": _number(outcome.control.measured),
        "passed": outcome.passed,
    }


def line(outcome: Outcome) -> str:
    """Return an outcome as one line."""
    check, control = outcome.check, outcome.control
    verdict = "pass" if outcome.passed else "FAIL"
    return (
        f"{verdict}  {outcome.claim.id:<27} measured {check.measured:<9.3g} {check.sense} "
        f"{check.bound:<7.3g} margin {report.margin(check):<7} control {control.measured:.3g}"
    )


def print_failures(outcomes: list[Outcome]) -> None:
    """Print why each outcome fails, to the standard error."""
    for outcome in outcomes:
        reason = "the control holds too" if outcome.check.satisfied else "the bound is violated"
        print(f"{outcome.claim.id}: {reason}. check: {outcome.check.detail}", file=sys.stderr)
        print(f"    control: {outcome.control.detail}", file=sys.stderr)


def run(claims: dict[str, Claim], workers: int) -> list[Outcome]:
    """Return the outcomes of claims in their order, and print each as soon as it is known.

    Args:
        claims: the claims by id.
        workers: the number of processes.
    """
    outcomes: dict[str, Outcome] = {}
    results = run_all(tuple(claims.values()), workers)
    with tqdm(results, total=len(claims), unit="claim", file=sys.stderr, dynamic_ncols=True) as bar:
        for outcome in bar:
            outcomes[outcome.claim.id] = outcome
            with tqdm.external_write_mode(file=sys.stdout):
                print(line(outcome), flush=True)
    return [outcomes[id] for id in claims]  # noqa: A001


def main(config: Config) -> int:
    """Run the claims and return the exit status."""
    claims = select(registry(), config.only)
    if config.list:
        for claim in claims.values():
            print(f"{claim.id:<27} {claim.source:<10} {claim.statement}")
        return 0
    if (config.report or config.check) and config.only:
        raise ValueError("--only is set; expected all claims with --report and --check")
    started = time.monotonic()
    outcomes = run(claims, config.workers)
    failed = [outcome for outcome in outcomes if not outcome.passed]
    print_failures(failed)
    seconds = time.monotonic() - started
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} claims pass, {seconds:.0f} s")
    if config.json:
        records = [as_record(outcome) for outcome in outcomes]
        text = json.dumps(records, indent=1, ensure_ascii=False) + "\n"
        write_atomically(config.json, text.encode())
    if config.report:
        write_atomically(config.report, report.render(outcomes).encode())
    changes = (
        report.differences(report.committed(), report.render(outcomes)) if config.check else []
    )
    if changes:
        print(f"paper_checks/REPORT.md is not what the code gives ({report.COMMAND} writes it):")
        print("\n".join(changes))
    return 1 if failed or changes else 0


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Config)))
    except ValueError as error:
        sys.exit(f"error: {error}")
