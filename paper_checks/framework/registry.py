"""Where claims are registered, and how they are selected by id."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from paper_checks.framework.claim import Claim, Measured, Source

SECTIONS = {
    "symmetric_exact": "Symmetric, exactly parametrized (r = r_A)",
    "two_phases": "Symmetric: the two phases of Theorems 1 and 5",
    "lemma_8": "Symmetric: Lemma 8",
    "symmetric_under": "Symmetric, under-parametrized (r < r_A)",
    "theorem_2_counterexample": "Theorem 2 (i): where it fails",
    "theorem_2": "Theorem 2 and Lemma 10: where they hold",
    "lemma_5": "Lemma 5 and (19) to (23)",
    "symmetric_over": "Symmetric, over-parametrized (r > r_A)",
    "starts": "Small and perturbed starts (Figures 1 and 4)",
    "proof_equations": "Equations inside the proofs",
    "asymmetric": "Asymmetric",
    "asymmetric_equations": "Asymmetric: the reduced iterations",
    "corollary_1": "Corollary 1",
    "remark_1": "Remark 1",
    "helper_lemmas": "Helper lemmas",
    "adapters": "Adapters",
    "gradient_starts": "Starts from gradients",
    "extended_precision": "Orders, in extended precision",
    "table1": "Table 1",
    "table1_other_papers": "Table 1: the rows of other papers",
    "accelerated": "Accelerated iterations",
    "exact_dynamics": "Ours: exact trajectories",
    "spectral_gap": "Ours: true rates, and what weak optimality leaves open",
    "rounding": "Ours: rounding",
    "overparametrized_sensing": "Neighbouring algorithms: sensing with too many columns",
    "robust_pca": "Robust PCA",
    "low_rank": "The factorization as a tool",
}
"""The modules of `paper_checks.claims` in the order of the report, with their titles."""

_REGISTRY: dict[str, Claim] = {}


def claim(
    id: str,  # noqa: A002
    statement: str,
    *,
    hypotheses: str,
    removes: str,
    instead: str,
    source: Source = "paper",
    derivation: str = "",
    **control: Any,
) -> Callable[[Callable[..., Measured]], Callable[..., Measured]]:
    """Register the decorated measurement as a claim.

    The control is the decorated function called with the keywords `control`, which remove one
    hypothesis. The report says of it: "control: without {removes}; instead, {instead}".

    Args:
        id: the number in the paper, or a name.
        statement: the statement in formulas.
        hypotheses: the conditions, and the runs that meet them.
        removes: the hypothesis that the control removes.
        instead: what the control does in its place.
        source: "paper", "ours" or "literature".
        derivation: the anchor of the derivation in docs/pages/findings.md; required for "ours".
        **control: the keywords of the control; at least one.
    """
    if not control:
        raise ValueError(
            f"claim {id!r} has no control; expected a keyword that removes a hypothesis"
        )
    if (source == "ours") != bool(derivation):
        raise ValueError(
            f"claim {id!r} of source {source!r} has the derivation {derivation!r}; expected an "
            "anchor in docs/pages/findings.md for source 'ours', and none for others"
        )

    def register(measure: Callable[..., Measured]) -> Callable[..., Measured]:
        if id in _REGISTRY:
            raise ValueError(f"claim {id!r} is registered twice; expected one claim per id")
        _REGISTRY[id] = Claim(
            id,
            source,
            statement,
            hypotheses,
            check=measure,
            control=functools.partial(measure, **control),
            removes=removes,
            instead=instead,
            derivation=derivation,
            section=measure.__module__.rpartition(".")[2],
            function=(measure.__name__, measure.__code__.co_firstlineno),
        )
        return measure

    return register


def registry() -> dict[str, Claim]:
    """Return all claims by id, in the order of the report."""
    for section in SECTIONS:
        importlib.import_module(f"paper_checks.claims.{section}")
    order = {section: i for i, section in enumerate(SECTIONS)}
    return dict(sorted(_REGISTRY.items(), key=lambda item: order[item[1].section]))


def select(claims: Mapping[str, Claim], only: tuple[str, ...]) -> dict[str, Claim]:
    """Return the claims that `only` names, or all if it is empty.

    Args:
        claims: claims by id.
        only: ids or beginnings of ids: "thm-1" selects thm-1 and all that begin with "thm-1-".

    Raises:
        ValueError: if an entry of `only` names no claim.
    """
    for name in only:
        if not any(_selects(name, id) for id in claims):  # noqa: A001
            raise ValueError(f"no claim is called {name!r}; expected one that --list shows")
    return {
        id: claim
        for id, claim in claims.items()  # noqa: A001
        if not only or any(_selects(name, id) for name in only)
    }


def _selects(name: str, id: str) -> bool:  # noqa: A002
    name, id = name.lower(), id.lower()  # noqa: A001
    return id == name or id.startswith(name + "-")
