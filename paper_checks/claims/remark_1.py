"""Remark 1 and A.5: one step of (6) as a factorization of A. The traced program gives its work."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp

import nyscaled as nys
from paper_checks.framework import Measured, claim, worst

FACTORIZATIONS = (
    *("cholesky", "svd", "eigh", "eig", "lu", "geqrf", "householder_product", "qr", "geqp3"),
)
RANK = 20
SIDES = (200, 400)


def _inner(value: Any) -> bool:
    return isinstance(value, jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr)


def equations(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Yield the equations of a program and how often each runs, in both branches of conditions."""
    for equation in jaxpr.eqns:
        yield equation, times
        length = times * equation.params.get("length", 1)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_inner):
            if _inner(inner):
                yield from equations(getattr(inner, "jaxpr", inner), length)


def work(program: Any) -> tuple[int, float]:
    """Return the largest of the shorter sides of factored matrices, and the number of operations.

    A factorization of an m × k matrix, k ≤ m, counts as mk², without the constant of its kind. A
    product of m × k and k × n counts as 2mkn.
    """
    sides, operations = [0], 0.0
    for equation, times in equations(program.jaxpr):
        name, shapes = equation.primitive.name, [v.aval.shape for v in equation.invars]
        if name in FACTORIZATIONS:
            *batch, m, n = shapes[0]
            sides.append(min(m, n))
            operations += times * math.prod(batch) * max(m, n) * min(m, n) ** 2
        if name == "dot_general":
            ((contracted, _), _) = equation.params["dimension_numbers"]
            size = math.prod(equation.outvars[0].aval.shape)
            operations += times * 2 * size * math.prod(shapes[0][i] for i in contracted)
    return max(sides), operations


@claim(
    "rem-1",
    "one step of (6) with η = 1 factors A by products of A with thin matrices and "
    "factorizations of matrices with r columns; its operations grow like n²r, those of an SVD "
    "of A like n³",
    hypotheses=f"n × n, n = {SIDES[0]} and {SIDES[1]}, r = {RANK}, Nyström start; counted in the "
    "traced program of nys.solvers.run(step, start, 1), which includes an SVD of the (2n) × r "
    "stack of X_0 and Y_0: the shorter side of any factored matrix (allowed r), and the growth "
    "of the operations from the first n to the second (allowed 4). Time is not measured, and the "
    "n^0.38 of the remark, which assumes the fastest known product of square matrices, is not "
    "tested",
    removes="the ScaledGD step",
    instead="the factorization by an SVD of A (problems.Asymmetric.optimum)",
    svd=True,
)
def remark_1(svd: bool = False) -> Measured:
    """Measure Remark 1 and A.5: the work of the step, not its time."""
    sides, totals = [], []
    for n in SIDES:
        problem = nys.problems.Asymmetric(jnp.eye(n))
        start = nys.Factors(jnp.ones((n, RANK)), jnp.zeros((n, RANK)))

        def factorize(problem: Any, start: nys.Factors) -> nys.Factors:
            if svd:
                return problem.optimum(RANK)
            return nys.solvers.run(nys.solvers.scaled_step(problem, 1.0), start, 1).params

        side, operations = work(jax.make_jaxpr(factorize)(problem, start))
        if side == 0:
            raise ValueError("no factorization in the traced program; expected one by its name")
        sides.append(side)
        totals.append(operations)
    result = worst(
        "",
        {
            "shorter side of a factored matrix": (max(sides), RANK),
            "growth of the operations": (totals[1] / totals[0], 4.0),
        },
    )
    facts = {f"operations over n²r at n = {SIDES[0]}": totals[0] / (SIDES[0] ** 2 * RANK)}
    return dataclasses.replace(result, facts=facts)
