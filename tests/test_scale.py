"""Equivariance in scale: what is computed from cA is what is computed from A, scaled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scale_cases import GRADIENT_STEPS, MEASURES, STARTS, STEPS, TRANSFORMS

# √c: of powers of two nothing is rounded, and results are equal to the last bit or nearly so.
EXACT = (2.0**-49, 2.0**49)  # c = 3e-30 … 3e29
ODD = (1e-15, 3.7e-9, 5.3e7, 1e15)
MIDDLE = (2.0**-33, 7e-6, 3e6, 2.0**33)  # c^{3/2} fits too


@functools.cache
def compiled(case):
    return jax.jit(case)


def agree(case, roots, rtol):
    expected = compiled(case)(jnp.float32(1.0))
    for root in roots:
        found = compiled(case)(jnp.float32(root))
        for f, w in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            if jnp.issubdtype(w.dtype, jnp.integer):
                np.testing.assert_array_equal(f, w)
                continue
            size = float(jnp.max(jnp.abs(w)))
            np.testing.assert_allclose(f, w, rtol=rtol, atol=max(rtol, 1e-6) * size)


@pytest.mark.long_beyond(3)
@pytest.mark.parametrize("name", [*STEPS, *STARTS, *MEASURES, *TRANSFORMS])
def test_powers_of_two_change_nothing(name):
    agree((STEPS | STARTS | MEASURES | TRANSFORMS)[name], EXACT, 1e-6)


@pytest.mark.long_beyond(14)
@pytest.mark.parametrize("name", [*STEPS, *STARTS, *MEASURES, *TRANSFORMS])
def test_other_factors_change_no_more_than_rounding(name):
    agree((STEPS | STARTS | MEASURES | TRANSFORMS)[name], ODD, 2e-4)


@pytest.mark.long
@pytest.mark.parametrize("name", GRADIENT_STEPS)
def test_gradient_steps_are_equivariant_where_the_gradient_fits(name):
    # What diverges has a gradient that soon does not fit.
    agree(GRADIENT_STEPS[name], MIDDLE[:3] if name == "diverging_gd" else MIDDLE, 2e-4)
