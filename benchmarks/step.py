"""One ScaledGD step against its floor, its products with A alone.

    python benchmarks/step.py
    python benchmarks/step.py --one-thread    # and its processor time: for a machine that is busy

Each function makes the same number of products or steps in one compiled loop. No environment
variable is set; the bounds are printed beside the ratios, and nothing is asserted.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from timing import interleaved, ratio

import nyscaled as nys
from nyscaled.matrices import transpose_times

RANK = 20
SYMMETRIC_BOUNDS = {1000: 2.0, 4000: 1.3}
ASYMMETRIC_BOUNDS = {(1000, 800): 2.0, (4000, 3000): 1.4}
OPTAX_BOUND = 2.5
DTYPES = (jnp.float32, jnp.float64)


@functools.partial(jax.jit, static_argnums=2)
def products(a: jax.Array, x: jax.Array, steps: int) -> jax.Array:
    return lax.fori_loop(0, steps, lambda _, y: a @ y, x)


@functools.partial(jax.jit, static_argnums=2)
def both_products(a: jax.Array, factors: nys.Factors, steps: int) -> nys.Factors:
    """A @ Y and Aᵀ @ X, neither of which waits for the other, as in a step."""
    return lax.fori_loop(
        0, steps, lambda _, f: nys.Factors(a @ f.right, transpose_times(a, f.left)), factors
    )


@functools.partial(jax.jit, static_argnums=2)
def transposed_products(a: jax.Array, factors: nys.Factors, steps: int) -> nys.Factors:
    """The same with `a.T`, for comparison."""
    return lax.fori_loop(0, steps, lambda _, f: nys.Factors(a @ f.right, a.T @ f.left), factors)


@functools.partial(jax.jit, static_argnums=2)
def loop(step: Any, x: jax.Array, steps: int) -> jax.Array:
    """Steps without recording, from a state so that `init` is not timed."""
    return lax.fori_loop(0, steps, lambda _, s: step.update(s), x)


def householder(a: jax.Array, x: jax.Array) -> jax.Array:
    """The same step with a LAPACK QR, for comparison."""
    z, r = jnp.linalg.qr(x)
    back = lax.linalg.triangular_solve(r, a @ z, left_side=False, lower=False, transpose_a=True)
    return 0.5 * x + 0.5 * back


@functools.partial(jax.jit, static_argnums=2)
def householder_loop(a: jax.Array, x: jax.Array, steps: int) -> jax.Array:
    return lax.fori_loop(0, steps, lambda _, y: householder(a, y), x)


def milliseconds(seconds: Any, name: str, steps: int) -> float:
    return float(jnp.median(jnp.asarray(seconds[name]))) / steps * 1e3


def symmetric(clock: Callable[[], float]) -> None:
    print("| m | dtype | A @ X | fused step | bound | optax path | bound | LAPACK QR step |")
    print("|---|---|---|---|---|---|---|---|")
    for m, bound in SYMMETRIC_BOUNDS.items():
        for dtype in DTYPES:
            a, _ = nys.spectra.psd(
                jax.random.key(0), m, nys.spectra.paper_spectrum("fig1ab"), dtype
            )
            x = nys.initializers.nystrom(jax.random.key(1), a, RANK, 0.1)
            problem = nys.problems.Symmetric(a)
            fused = nys.solvers.scaled_step(problem, 0.5)
            path = nys.solvers.gradient_step(problem, nys.scaled_gd(0.5))
            starts = fused.init(x), path.init(x)
            steps = 50 if m == 1000 else 10
            ours = {
                "product": functools.partial(products, a, x, steps),
                "fused": functools.partial(loop, fused, starts[0], steps),
                "optax": functools.partial(loop, path, starts[1], steps),
            }
            seconds = interleaved(ours, clock=clock)
            each = milliseconds(seconds, "product", steps)
            ratios = {k: ratio(seconds, k, "product") for k in ("fused", "optax")}
            # Alone and last: the threads of LAPACK's BLAS go on spinning after a call, and would
            # slow down whatever is timed next to it.
            qr = {"lapack": functools.partial(householder_loop, a, x, steps)}
            lapack = interleaved(qr, clock=clock)
            slower = milliseconds(lapack, "lapack", steps) / each
            time.sleep(1.0)
            print(
                f"| {m} | {jnp.dtype(dtype).name} | {each:.2f} ms | {ratios['fused']:.2f} × "
                f"| {bound} | {ratios['optax']:.2f} × | {OPTAX_BOUND} | {slower:.2f} × |",
                flush=True,
            )


def asymmetric(clock: Callable[[], float]) -> None:
    print("| m × n | dtype | A @ Y and Aᵀ @ X | fused step | bound | products with `a.T` |")
    print("|---|---|---|---|---|---|")
    for (m, n), bound in ASYMMETRIC_BOUNDS.items():
        for dtype in DTYPES:
            spectrum = nys.spectra.paper_spectrum("fig1ab")
            a, _, _ = nys.spectra.rectangular(jax.random.key(0), m, n, spectrum, dtype)
            fused = nys.solvers.scaled_step(nys.problems.Asymmetric(a), 0.5)
            start = nys.initializers.nystrom_factors(jax.random.key(1), a, RANK, 0.1)
            state = fused.update(fused.init(start))  # so that neither factor is zero
            steps = 50 if m == 1000 else 10
            seconds = interleaved(
                {
                    "products": functools.partial(both_products, a, state.factors, steps),
                    "fused": functools.partial(loop, fused, state, steps),
                    "transposed": functools.partial(transposed_products, a, state.factors, steps),
                },
                clock=clock,
            )
            print(
                f"| {m} × {n} | {jnp.dtype(dtype).name} "
                f"| {milliseconds(seconds, 'products', steps):.2f} ms "
                f"| {ratio(seconds, 'fused', 'products'):.2f} × | {bound} "
                f"| {ratio(seconds, 'transposed', 'products'):.2f} × |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description="Steps against their products with A.")
    parser.add_argument("--one-thread", action="store_true", help="and its processor time")
    clock = time.perf_counter
    if parser.parse_args().one_thread:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false"
        clock = time.process_time
    jax.config.update("jax_enable_x64", True)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, r = {RANK}\n")
    symmetric(clock)
    print()
    asymmetric(clock)


if __name__ == "__main__":
    main()
