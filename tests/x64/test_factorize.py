"""float64: matrices of exactly low rank, and derivatives against central differences."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nyscaled as nys

M, N = 30, 24
RNG = np.random.default_rng(0)
LEFT, RIGHT = (jnp.asarray(np.linalg.qr(RNG.standard_normal((s, N)))[0]) for s in (M, N))
DIRECTION, WEIGHTS = (jnp.asarray(RNG.standard_normal((M, N))) for _ in range(2))


@pytest.mark.parametrize("condition", [1.0, 1e4])
def test_one_step_is_exact_to_rounding(condition):
    a = (LEFT[:, :5] * np.geomspace(1, 1 / condition, 5)) @ RIGHT[:, :5].T
    f = nys.factorize(a, 5)
    assert int(f.passes) == 2
    assert jnp.linalg.norm(a - (f.left * f.singular_values) @ f.right.T) < 1e-13


SPECTRA = {
    "apart": 1 / np.arange(1.0, N + 1),
    "repeated": np.array([1.0, 1, 1, 0.5, *(0.3 / np.arange(1.0, N - 3))]),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_derivatives_are_central_differences(name):
    """Of singular values and the projected matrix; of what is smooth where values are equal."""
    a = (LEFT * SPECTRA[name]) @ RIGHT.T

    def quantity(a):
        f = nys.factorize(a, 4, passes=4, oversampling=8)
        projected = jnp.sum((f.left * f.singular_values) @ f.right.T * WEIGHTS)
        return projected, jnp.sum(f.singular_values**2)

    def reference(a):
        u, s, vt = jnp.linalg.svd(a, full_matrices=False)
        return jnp.sum((u[:, :4] * s[:4]) @ vt[:4] * WEIGHTS), jnp.sum(s[:4] ** 2)

    h = 1e-5
    ahead, behind = reference(a + h * DIRECTION), reference(a - h * DIRECTION)
    for i in range(2):
        expected = (ahead[i] - behind[i]) / (2 * h)
        gradient = jax.grad(lambda a, i=i: quantity(a)[i])(a)
        tangent = jax.jvp(lambda a, i=i: quantity(a)[i], (a,), (DIRECTION,))[1]
        np.testing.assert_allclose(tangent, expected, rtol=1e-5)
        np.testing.assert_allclose(jnp.sum(gradient * DIRECTION), tangent, rtol=1e-8)


def test_the_derivative_at_zero_is_finite():
    zero = jnp.zeros((M, N))
    gradient = jax.grad(lambda a: nys.factorize(a, 4).singular_values.sum())(zero)
    assert jnp.all(jnp.isfinite(gradient))


def test_second_derivatives_are_differences_of_derivatives():
    a = (LEFT * SPECTRA["apart"]) @ RIGHT.T

    @jax.jit
    def slope(t):
        def quantity(a):
            f = nys.factorize(a, 4, passes=4, oversampling=8)
            return jnp.sum((f.left * f.singular_values**2) @ f.right.T * WEIGHTS)

        return jnp.sum(jax.grad(quantity)(a + t * DIRECTION) * DIRECTION)

    h = 1e-5
    expected = (slope(h) - slope(-h)) / (2 * h)
    np.testing.assert_allclose(jax.grad(slope)(0.0), expected, rtol=1e-4)


@pytest.mark.parametrize("options", [{"rank": 4}, {"rank": 4, "passes": 2}, {"tol": 0.3}])
def test_single_precision_stays_single(options):
    """All of it: a product in double precision would take twice the time."""
    a = jnp.asarray((LEFT * SPECTRA["apart"]) @ RIGHT.T, jnp.float32)
    f = nys.factorize(a, **options)
    assert {x.dtype for x in (f.left, f.singular_values, f.right, f.error_estimate)} == {a.dtype}
    if "rank" in options:
        text = jax.jit(lambda a: nys.factorize(a, **options)).lower(a).as_text()
        assert not re.search(r"dot_general.*xf64>", text)
