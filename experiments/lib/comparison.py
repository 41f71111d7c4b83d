"""What paired runs of several methods show, in words that were chosen before the runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.lib import paired
from experiments.lib.journal import Line

Runs = Mapping[str, Mapping[int, Line]]
"""Lines of runs by method and seed."""

ENOUGH = 8
"""Pairs without which nothing is claimed."""
FEW, NONE, DIVERGED = "too few pairs", "no difference was seen", "a run diverged"


class Endpoint(NamedTuple):
    """What is compared.

    Attributes:
        field: field of a line.
        title: its name in print.
        margin: largest difference that has no practical effect.
        relative: whether the margin is a share of the second method's mean.
    """

    field: str
    title: str
    margin: float
    relative: bool = True


def values(runs: Runs, field: str, method: str, seeds: Sequence[int]) -> np.ndarray:
    """Return a field of the runs of a method.

    Args:
        runs: the runs.
        field: the field.
        method: the method.
        seeds: the seeds.
    """
    return np.array([runs[method][seed][field] for seed in seeds])


def common(runs: Runs, first: str, second: str) -> list[int]:
    """Return the seeds that two methods have in common.

    Args:
        runs: the runs.
        first: a method.
        second: another one.
    """
    return sorted(runs.get(first, {}).keys() & runs.get(second, {}).keys())


def compare(
    runs: Runs, endpoint: Endpoint, pairs: Sequence[tuple[str, str]]
) -> dict[str, dict[str, Any]]:
    """Return what each pair of methods shows, corrected for their number.

    A run diverged if its value is not finite. Its pair of methods has no statistics then: those of
    the other seeds would leave out what the method does.

    Args:
        runs: the runs.
        endpoint: what is compared.
        pairs: pairs of methods; those with fewer than two seeds in common are left out.
    """
    results: dict[str, dict[str, Any]] = {}
    for first, second in pairs:
        seeds = common(runs, first, second)
        if len(seeds) < 2:
            continue
        one, other = (values(runs, endpoint.field, name, seeds) for name in (first, second))
        diverged = [s for s, d in zip(seeds, one - other, strict=True) if not np.isfinite(d)]
        if diverged:
            nothing = dict.fromkeys((*paired.Paired._fields, "margin"))
            nothing |= {"pairs": len(seeds), "equal": False, "diverged": diverged}
            results[f"{first} − {second}"] = nothing
            continue
        margin = endpoint.margin * (float(other.mean()) if endpoint.relative else 1.0)
        equal = paired.equivalent(one - other, margin)
        result = paired.compare(one - other)._asdict()
        results[f"{first} − {second}"] = result | {"margin": margin, "equal": equal}
    # The number of methods counts, not how many of them are through.
    tests = [1.0 if "diverged" in r else r["t_test"] for r in results.values()]
    tests += [1.0] * (len(pairs) - len(results))
    for result, corrected in zip(results.values(), paired.holm(tests), strict=False):
        result["corrected"] = float(corrected)
        result["verdict"] = verdict(result)
    return results


def verdict(result: Mapping[str, Any]) -> str:
    """Return what is claimed.

    Args:
        result: the entries of `paired.Paired`, with `corrected` and `equal`; `diverged` has the
            seeds of runs that diverged, if there are any.

    Examples:
        >>> seen = {"pairs": 8, "low": -2.0, "high": -1.0, "p": 0.008, "corrected": 0.01}
        >>> verdict(seen | {"equal": False}), verdict(seen | {"high": 1.0, "equal": False})
        ('lower', 'no difference was seen')
    """
    if result.get("diverged"):
        return DIVERGED
    if result["pairs"] < ENOUGH:
        return FEW
    outside = result["low"] > 0 or result["high"] < 0
    if outside and result["p"] < 0.05 and result["corrected"] < 0.05:
        return "lower" if result["high"] < 0 else "higher"
    return "equal" if result["equal"] else NONE


def table(
    runs: Runs,
    endpoints: Sequence[Endpoint],
    results: Mapping[str, Mapping[str, Mapping[str, Any]]],
    chosen: Mapping[str, tuple[float, float | None]],
    base: str,
    *,
    pairs: str = "seeds",
    digits: int = 3,
) -> str:
    """Return the comparisons with one method as a table in Markdown.

    Args:
        runs: the runs.
        endpoints: what is compared.
        results: what `compare` gave, by field.
        chosen: learning rate and second number of each method.
        base: the method that the others are compared with.
        pairs: what is paired.
        digits: digits after the point.
    """
    head = ["method", pairs, "learning rate", "second number"]
    rows = [[*head, *(f"{e.title}: mean, and difference to {base}" for e in endpoints)]]
    rows.append(["---"] * len(rows[0]))
    for method, lines in runs.items():
        rate, number = chosen[method]
        cells = [method, str(len(lines)), f"{rate:g}", "" if number is None else f"{number:g}"]
        for endpoint in endpoints:
            mean = values(runs, endpoint.field, method, sorted(lines)).mean()
            result = results[endpoint.field].get(f"{method} − {base}")
            cell = f"{mean:.{digits}f}"
            if result is not None and "diverged" in result:
                which = ", ".join(map(str, result["diverged"]))
                cell += f"; {result['verdict']} ({pairs} {which})"
            elif result is not None:
                shown = [f"{result[name]:+.{digits}f}" for name in ("mean", "low", "high")]
                cell += f"; {shown[0]} [{shown[1]}, {shown[2]}]: {result['verdict']}"
            cells.append(cell)
        rows.append(cells)
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
