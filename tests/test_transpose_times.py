"""matrices.transpose_times: no program makes a transposed copy of a dense A."""

import re

import chex
import jax
import jax.numpy as jnp
import pytest
from cases import normal

import nyscaled as nys
from nyscaled.linalg import leading_factors
from nyscaled.matrices import transpose_times

R = 2
KEY = jax.random.key(0)
ROWS, COLUMNS = 40, 30
WIDE = normal(5, (ROWS, COLUMNS))
PAIR_OF_WIDE = nys.Factors(normal(6, (ROWS, R)), normal(7, (COLUMNS, R)))
PRODUCTS = {
    "transpose_times": lambda a: transpose_times(a, PAIR_OF_WIDE.left),
    "scaled_step": lambda a: nys.solvers.run(
        nys.solvers.scaled_step(nys.problems.Asymmetric(a)), PAIR_OF_WIDE, 2
    ),
    "gradient": lambda a: nys.problems.Asymmetric(a).gradient(PAIR_OF_WIDE),
    "sensing": lambda a: nys.problems.Sensing(a[None], jnp.ones(1)).gradient(PAIR_OF_WIDE),
    "robust": lambda a: nys.problems.RobustPCA(a, 0.1).gradient(PAIR_OF_WIDE),
    "phase": lambda a: nys.problems.Sensing(nys.problems.phase.RankOne(a), jnp.ones(ROWS)).gradient(
        PAIR_OF_WIDE.right
    ),
    "spectral_norm": nys.linalg.spectral_norm,
    "leading_factors": lambda a: leading_factors(KEY, a, R),
    **{
        f"{name} {options}": lambda a, name=name, options=options: nys.lora.KERNEL_INITS[name](
            KEY, a, R, 1.0, **options
        )
        for name, options in (("nora", {"side": "output"}), ("pissa", {"niter": 2}), ("olora", {}))
    },
}


def transposed(fn):
    """The products of XLA's program that contract the rows of A from the left and copy it."""
    text = jax.jit(fn).lower(WIDE).compile().as_text()
    assert " dot(" in text
    # With x from the left the result is (k, n), or this in the order of columns.
    result = re.escape(f"= f32[{COLUMNS},") + r"\d+" + re.escape("]{1,0} dot(")
    contracted = re.escape("lhs_contracting_dims={0}")
    products = re.findall(rf"{result}(%[\w.-]+), .*{contracted}", text)
    return [a for a in products if f"{a} = f32[{ROWS},{COLUMNS}]" in text]


@pytest.mark.long_beyond(2)
@pytest.mark.parametrize("name", PRODUCTS)
def test_no_program_transposes_a_dense_matrix(name):
    assert not transposed(PRODUCTS[name])


def test_a_transpose_is_seen_in_either_form():
    x = PAIR_OF_WIDE.left
    assert transposed(lambda a: a.T @ x)
    assert transposed(lambda a: jax.lax.dot_general(x, a, (((0,), (0,)), ((), ()))).T)


def test_products_with_the_transpose_are_batched_and_have_derivatives():
    x = PAIR_OF_WIDE.left
    a = WIDE
    batch = jax.vmap(transpose_times)(jnp.stack([a, 2 * a]), jnp.stack([x, x]))
    chex.assert_trees_all_close(batch[1], 2 * a.T @ x, rtol=1e-5, atol=1e-5)
    found = jax.grad(lambda a, x: jnp.sum(transpose_times(a, x) ** 2), argnums=(0, 1))(a, x)
    image = a.T @ x
    chex.assert_trees_all_close(found, (2 * x @ image.T, 2 * a @ image), rtol=1e-4, atol=1e-4)
