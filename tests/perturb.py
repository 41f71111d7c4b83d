"""Run the claims with another processor's rounding, imitated: each product times 1 + O(eps).

    python tests/perturb.py SEED [arguments of `python -m paper_checks`]

The factor of an entry is a hash of its bits and the seed: one seed always gives the same result.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import tyro
from jax import lax
from jax._src.lax.lax import _dot_general_lower, dot_general_p  # the rule has no public name
from jax.interpreters import mlir

from paper_checks.__main__ import Config, main

ULPS = 1.0
"""The largest change in units of eps: about what another order of summation does to a short sum."""
BITS = {4: (jnp.uint32, 0x9E3779B1, 15), 8: (jnp.uint64, 0x9E3779B97F4A7C15, 31)}
"""By size of the number: an integer of that size, an odd constant for hashing, and a shift."""


def noisy(product: jax.Array, seed: int) -> jax.Array:
    """Return `product` with each entry times 1 + ULPS·eps·u, where |u| ≤ 1."""
    if product.dtype not in (jnp.float32, jnp.float64):
        return product
    kind, constant, shift = BITS[product.dtype.itemsize]
    bits = lax.bitcast_convert_type(product, kind)
    for salt in (2 * seed + 1, 2 * seed + 3):
        bits = (bits ^ kind(salt)) * kind(constant)
        bits = bits ^ (bits >> kind(shift))
    share = bits.astype(product.dtype) / 2.0 ** (8 * product.dtype.itemsize)  # in [0, 1]
    return product * (1 + ULPS * jnp.finfo(product.dtype).eps * (2 * share - 1)).astype(
        product.dtype
    )


def install(seed: int) -> None:
    """Perturb the products of all programs that this process compiles from now on, on the CPU."""
    perturb = mlir.lower_fun(functools.partial(noisy, seed=seed), multiple_results=False)

    def rule(ctx: mlir.LoweringRuleContext, *args: object, **parameters: object) -> object:
        (product,) = _dot_general_lower(ctx, *args, **parameters, platform="cpu")
        inner = ctx.replace(primitive=None, avals_in=list(ctx.avals_out))
        return perturb(inner, product)

    mlir.register_lowering(dot_general_p, rule, platform="cpu")


if __name__ == "__main__":
    install(int(sys.argv[1]))
    a = jnp.full((3, 3), 0.1)
    print(
        "a product moves by",
        float(jnp.abs(jax.jit(jnp.matmul)(a, a) / 0.03 - 1).max()),
        file=sys.stderr,
    )
    sys.exit(main(tyro.cli(Config, args=["--workers", "1", *sys.argv[2:]])))
