"""float64: equivariance in scale from c = 1e-250 to 1e250."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scale_cases import GRADIENT_STEPS, MEASURES, STARTS, STEPS, TRANSFORMS

CASES = STEPS | STARTS | MEASURES | TRANSFORMS
ROOTS = (2.0**-410, 1e-125, 3.7e-70, 5.3e61, 1e125, 2.0**410)
# Where c^{3/2} fits too.
MIDDLE = (1e-90, 7e-51, 3e40, 1e90)


def agree(case, roots):
    compiled = jax.jit(case)
    expected = compiled(jnp.float64(1.0))
    for root in roots:
        found = compiled(jnp.float64(root))
        for f, w in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            if jnp.issubdtype(w.dtype, jnp.integer):
                np.testing.assert_array_equal(f, w)
            else:
                size = float(jnp.max(jnp.abs(w)))
                np.testing.assert_allclose(f, w, rtol=1e-9, atol=1e-9 * size)


SHORT = {"scaled", "pair_nystrom", "until_qdwh", "residual", "in_basis", "rescaled", "precgd"}


def cases(names):
    return [n if n in SHORT else pytest.param(n, marks=pytest.mark.long) for n in names]


@pytest.mark.parametrize("name", cases(CASES))
def test_scale_changes_no_more_than_rounding(name):
    agree(CASES[name], ROOTS)


@pytest.mark.parametrize("name", cases(GRADIENT_STEPS))
def test_gradient_steps_are_equivariant_where_the_gradient_fits(name):
    agree(GRADIENT_STEPS[name], MIDDLE)
