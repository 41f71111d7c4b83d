"""`python -m paper_checks [--only ID …] [--list] [--check] [--json FILE] [--report FILE]`."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from paper_checks import report
from paper_checks.claim import Outcome, registry, select
from paper_checks.runner import run_all


@dataclasses.dataclass(frozen=True)
class Config:
    """Run the paper's statements as claims; end with status 1 if one fails."""

    only: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Ids to run; "thm-1" is all of Theorem 1. May be repeated; all claims if absent."""
    list: bool = False
    """Print ids and statements, and run nothing."""
    json: Path | None = None
    """Write the outcomes here."""
    report: Path | None = None
    """Write the report here, as Markdown."""
    check: bool = False
    """Also fail where the committed report is not what the code gives, and print those lines."""
    workers: int = 2
    """How many processes share the work."""


def write_atomically(path: Path, text: str) -> None:
    """Writes beside `path`, then renames: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no inf and no nan


def as_record(outcome: Outcome) -> dict[str, Any]:
    """An outcome as --json writes it."""
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
    """An outcome as one line."""
    check, control = outcome.check, outcome.control
    verdict = "pass" if outcome.passed else "FAIL"
    return (
        f"{verdict}  {outcome.claim.id:<22} measured {check.measured:<9.3g} {check.sense} "
        f"{check.bound:<7.3g} margin {report.margin(check):<7} control {control.measured:.3g}"
    )


def main(config: Config) -> int:
    """Run the claims and return the exit status."""
    claims = select(registry(), config.only)
    if config.list:
        for claim in claims.values():
            print(f"{claim.id:<22} {claim.source:<10} {claim.statement}")
        return 0
    if (config.report or config.check) and config.only:
        raise ValueError("--only is set; expected all claims with --report and --check")
    found: dict[str, Outcome] = {}
    begin = time.monotonic()
    results = run_all(tuple(claims.values()), config.workers)
    with tqdm(results, total=len(claims), unit="claim", file=sys.stderr, dynamic_ncols=True) as bar:
        for outcome in bar:
            found[outcome.claim.id] = outcome
            with tqdm.external_write_mode(file=sys.stdout):
                print(line(outcome), flush=True)
    outcomes = [found[id] for id in claims]  # noqa: A001
    failed = [o for o in outcomes if not o.passed]
    for outcome in failed:
        why = "the control holds too" if outcome.check.satisfied else "the bound is violated"
        print(f"{outcome.claim.id}: {why}. check: {outcome.check.detail}", file=sys.stderr)
        print(f"    control: {outcome.control.detail}", file=sys.stderr)
    seconds = time.monotonic() - begin
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} claims pass, {seconds:.0f} s")
    if config.json:
        records = [as_record(outcome) for outcome in outcomes]
        write_atomically(config.json, json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    if config.report:
        write_atomically(config.report, report.render(outcomes))
    changed = (
        report.differences(report.committed(), report.render(outcomes)) if config.check else []
    )
    if changed:
        print(f"paper_checks/REPORT.md is not what the code gives ({report.COMMAND} writes it):")
        print("\n".join(changed))
    return 1 if failed or changed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Config)))
    except ValueError as error:
        sys.exit(f"error: {error}")
