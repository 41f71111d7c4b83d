"""One ScaledGD step against its floor, the product A @ X alone.

    python benchmarks/step.py

Each function makes the same number of products or steps in one compiled loop. No environment
variable is set; the bounds are printed beside the ratios, and nothing is asserted.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from timing import interleaved, ratio

import nyscaled as nys

RANK = 20
BOUNDS = {1000: 2.0, 4000: 1.3}
OPTAX_BOUND = 2.5


@functools.partial(jax.jit, static_argnums=2)
def products(a: jax.Array, x: jax.Array, steps: int) -> jax.Array:
    return lax.fori_loop(0, steps, lambda _, y: a @ y, x)


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


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, r = {RANK}")
    print("| m | dtype | A @ X | fused step | bound | optax path | bound | LAPACK QR step |")
    print("|---|---|---|---|---|---|---|---|")
    for m in (1000, 4000):
        for dtype in (jnp.float32, jnp.float64):
            a, _ = nys.spectra.psd(
                jax.random.key(0), m, nys.spectra.paper_spectrum("fig1ab"), dtype
            )
            x = nys.initializers.nystrom(jax.random.key(1), a, RANK, 0.1)
            problem = nys.problems.Symmetric(a)
            fused = nys.solvers.scaled_step(problem, 0.5)
            path = nys.solvers.gradient_step(problem, nys.scaled_gd(0.5))
            starts = fused.init(x), path.init(x)
            steps = 50 if m == 1000 else 10
            product = functools.partial(products, a, x, steps)
            ours = {
                "product": product,
                "fused": functools.partial(loop, fused, starts[0], steps),
                "optax": functools.partial(loop, path, starts[1], steps),
            }
            seconds = interleaved(ours)
            each = float(jnp.median(jnp.asarray(seconds["product"]))) / steps * 1e3
            ratios = {k: ratio(seconds, k, "product") for k in ("fused", "optax")}
            # Alone and last: the threads of LAPACK's BLAS go on spinning after a call, and would
            # slow down whatever is timed next to it.
            lapack = interleaved({"lapack": functools.partial(householder_loop, a, x, steps)})
            ratios["lapack"] = float(
                jnp.median(jnp.asarray(lapack["lapack"]))
                / jnp.median(jnp.asarray(seconds["product"]))
            )
            time.sleep(1.0)
            print(
                f"| {m} | {jnp.dtype(dtype).name} | {each:.2f} ms | {ratios['fused']:.2f} × "
                f"| {BOUNDS[m]} | {ratios['optax']:.2f} × | {OPTAX_BOUND} "
                f"| {ratios['lapack']:.2f} × |",
                flush=True,
            )


if __name__ == "__main__":
    main()
