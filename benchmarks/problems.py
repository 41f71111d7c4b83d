"""Gradients of completion, sensing and robust PCA beside the passes over data that they require.

    python benchmarks/problems.py

Completion: a gradient of ½‖𝒜(XYᵀ) − b‖² at p = |Ω| random entries, against one gather of the rows
of X and Y at Ω with their inner products (which any form makes), and against the dense form that
masks an m × n product. Sensing: against one product 𝒜(XYᵀ). Robust PCA: T_α against sorting, and a
gradient against its three dense products. Trials under vmap against a loop over them in one
compiled call. The bounds are printed beside the ratios, and nothing is asserted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from timing import interleaved, ratio

import nyscaled as nys

ROUNDS = 11


def factors_of(seed: int, m: int, n: int, rank: int) -> nys.Factors:
    left, right = jax.random.split(jax.random.key(seed))
    return nys.Factors(jax.random.normal(left, (m, rank)), jax.random.normal(right, (n, rank)))


def random_entries(m: int, n: int, p: int) -> nys.problems.Sensing:
    keys = jax.random.split(jax.random.key(p), 3)
    rows = jax.random.randint(keys[0], (p,), 0, m)
    columns = jax.random.randint(keys[1], (p,), 0, n)
    return nys.problems.completion.observed(rows, columns, jax.random.normal(keys[2], (p,)), (m, n))


def compiled(fn: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    return functools.partial(jax.jit(fn), *args)


def gradient(problem: Any, point: Any) -> Any:
    return problem.gradient(point)


def forward(problem: Any, point: Any) -> Any:
    return problem.map.forward(*point)


def masked(mask: jax.Array, target: jax.Array, point: nys.Factors) -> nys.Factors:
    residual = mask * (point.left @ point.right.T - target)
    return nys.Factors(residual @ point.right, residual.T @ point.left)


def line(what: str, size: str, milliseconds: float, value: float, floor: str, bound: str) -> None:
    print(
        f"| {what} | {size} | {milliseconds:.2f} ms | {value:.2f} × {floor} | {bound} |", flush=True
    )


def median(seconds: dict[str, np.ndarray], name: str) -> float:
    return float(np.median(seconds[name])) * 1e3


def completion(m: int = 2000, n: int = 2000) -> None:
    for p, rank in ((40_000, 8), (160_000, 8), (160_000, 32)):
        problem, point = random_entries(m, n, p), factors_of(1, m, n, rank)
        entries: Any = problem.map
        mask = jnp.zeros((m, n)).at[entries.rows, entries.columns].set(1.0)
        seconds = interleaved(
            {
                "gather": compiled(forward, problem, point),
                "gradient": compiled(gradient, problem, point),
                "dense": compiled(masked, mask, mask, point),
            },
            ROUNDS,
        )
        size, each = f"{m}², p = {p}, r = {rank}", median(seconds, "gradient")
        value = ratio(seconds, "gradient", "gather")
        line("completion, gradient", size, each, value, "a gather", "≤ 4")
        value = ratio(seconds, "dense", "gradient")
        line("… the dense masked form", size, median(seconds, "dense"), value, "the gradient", "")


def sensing(m: int = 100, p: int = 2000, rank: int = 4) -> None:
    problem, _ = nys.problems.sensing.gaussian(jax.random.key(0), m, [1.0, 0.5], p)
    x = factors_of(1, m, m, rank)
    cases = {"symmetric": x.left, "asymmetric": x}
    for name, point in cases.items():
        seconds = interleaved(
            {
                "forward": compiled(forward, problem, x),
                "gradient": compiled(gradient, problem, point),
            },
            ROUNDS,
        )
        value = ratio(seconds, "gradient", "forward")
        size = f"{p} × {m}², r = {rank}"
        line(
            f"sensing, gradient, {name}",
            size,
            median(seconds, "gradient"),
            value,
            "𝒜(XYᵀ)",
            "≤ 2.3",
        )


def sorted_threshold(a: jax.Array, count: int) -> jax.Array:
    size = jnp.abs(a)
    row, column = jnp.sort(size, axis=1)[:, -count], jnp.sort(size, axis=0)[-count]
    return jnp.where((size >= row[:, None]) & (size >= column), a, 0)


def robust(m: int = 1000, rank: int = 20) -> None:
    problem, truth = nys.problems.robust.corrupted(
        jax.random.key(0), m, m, jnp.linspace(1.0, 0.5, rank), 0.1
    )
    ones = jnp.ones((m, m))
    seconds = interleaved(
        {
            "products": compiled(masked, ones, problem.observed, truth),
            "threshold": compiled(nys.problems.robust.threshold, problem.observed, 0.2),
            "sorts": compiled(functools.partial(sorted_threshold, count=m // 5), problem.observed),
            "gradient": compiled(gradient, problem, truth),
        },
        ROUNDS,
    )
    size, each = f"{m}², r = {rank}", median(seconds, "gradient")
    value = ratio(seconds, "gradient", "products")
    line("robust PCA, gradient", size, each, value, "its three products", "")
    value = ratio(seconds, "sorts", "threshold")
    line("… T_α by sorting", size, median(seconds, "sorts"), value, "T_α", "≥ 5")


def trials(count: int = 8, m: int = 500, p: int = 20_000, rank: int = 8, steps: int = 20) -> None:
    """ScaledGD on completion problems of equal shape."""
    problems = jax.vmap(lambda key: case(key, m, p))(jax.random.split(jax.random.key(0), count))
    points = jax.tree.map(lambda f: jnp.tile(f, (count, 1, 1)), factors_of(1, m, m, rank))

    def trial(pair: Any) -> Any:
        step = nys.solvers.gradient_step(pair[0], nys.scaled_gd(0.1))
        return nys.solvers.run(step, pair[1], steps, throw=False).params

    seconds = interleaved(
        {
            "loop": compiled(functools.partial(lax.map, trial), (problems, points)),
            "vmap": compiled(jax.vmap(trial), (problems, points)),
        },
        ROUNDS,
    )
    size, each = f"{count} trials, {m}², p = {p}, r = {rank}", median(seconds, "vmap")
    line(
        "completion, trials under vmap",
        size,
        each,
        ratio(seconds, "vmap", "loop"),
        "a loop",
        "≤ 1.1",
    )


def case(key: jax.Array, m: int, p: int) -> nys.problems.Sensing:
    rows, columns = jax.random.randint(key, (2, p), 0, m)
    values = jax.random.normal(jax.random.fold_in(key, 1), (p,))
    return nys.problems.completion.observed(rows, columns, values, (m, m))


def main() -> None:
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, float32")
    print("| what | size | time | ratio | bound |")
    print("|---|---|---|---|---|")
    completion()
    sensing()
    robust()
    trials()


if __name__ == "__main__":
    main()
