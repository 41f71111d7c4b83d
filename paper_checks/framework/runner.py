"""Run claims in several processes, each with whole sections, the largest first."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import jax

from paper_checks.framework.claim import Claim, Measured, Outcome
from paper_checks.framework.registry import registry


def _measure(ids: Sequence[str]) -> list[tuple[str, Measured, Measured]]:
    """Return check and control by id; claims hold functions, which cannot cross processes."""
    jax.config.update("jax_enable_x64", True)
    claims = registry()
    return [(id, claims[id].check(), claims[id].control()) for id in ids]  # noqa: A001


def run_all(claims: Sequence[Claim], workers: int = 2) -> Iterator[Outcome]:
    """Yield the outcome of each claim as soon as it is known.

    Args:
        claims: the claims to run. Those of one section share their trajectories, and one process.
        workers: the number of processes. 1 runs all claims in the current process.
    """
    by_id = {claim.id: claim for claim in claims}
    sections = [
        [claim.id for claim in group] for _, group in itertools.groupby(claims, lambda c: c.section)
    ]
    if workers == 1 or len(sections) == 1:
        for claim in claims:
            ((id, check, control),) = _measure([claim.id])  # noqa: A001
            yield Outcome(by_id[id], check, control)
        return
    context = multiprocessing.get_context("spawn")  # a forked JAX may hang
    with ProcessPoolExecutor(workers, context) as pool:
        futures = [pool.submit(_measure, ids) for ids in sorted(sections, key=len, reverse=True)]
        for future in as_completed(futures):
            for id, check, control in future.result():  # noqa: A001
                yield Outcome(by_id[id], check, control)
