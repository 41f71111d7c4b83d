"""How often error estimates of `nys.factorize` are below the error, and what deviations mean."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowrank_cases import SPECTRA, matrix

import nyscaled as nys

M, N, RANK = 40, 30, 4
CASES = [
    pytest.param(name, passes, marks=() if name in ("harmonic", "flat") else pytest.mark.long)
    for name in SPECTRA
    for passes in (2, 4)
]
DRAWS = 2000


@functools.partial(jax.jit, static_argnames="passes")
def draws(a, passes):
    """Estimates and errors of many keys, one after another in one program."""

    def one(key):
        f = nys.factorize(a, RANK, key=key, passes=passes, oversampling=3)
        residual = a - (f.left * f.singular_values) @ f.right.T
        return f.error_estimate, jnp.linalg.norm(residual)

    return jax.lax.map(one, jax.random.split(jax.random.key(1), DRAWS))


@pytest.mark.long
@pytest.mark.parametrize(("spectrum", "passes"), CASES)
def test_how_often_an_estimate_is_below_the_error(spectrum, passes):
    """Leaving out (two passes) or probes (more): rarely below half of it, and right on average."""
    a = jnp.asarray(matrix(M, N, SPECTRA[spectrum](N)))
    estimates, errors = map(np.asarray, draws(a, passes))
    assert np.mean(estimates < 0.5 * errors) <= 0.02
    mean = np.sqrt(np.mean(estimates**2) / np.mean(errors**2))
    assert 0.97 < mean < (1.25 if passes == 2 else 1.03)


def test_the_count_can_fail():
    """Half of the estimate is below half of the error about half of the time."""
    a = jnp.asarray(matrix(M, N, SPECTRA["harmonic"](N)))
    estimates, errors = map(np.asarray, draws(a, 4))
    assert np.mean(0.5 * estimates < 0.5 * errors) > 0.3


@pytest.mark.long
@pytest.mark.parametrize("passes", [2, 3, 4])
def test_deviations_are_those_of_other_keys(passes):
    """The jackknife is biased upwards: within a factor of 8 of the spread, and not far below it."""
    a = jnp.asarray(matrix(M, N, SPECTRA["harmonic"](N)))

    @jax.jit
    def run(keys):
        return jax.lax.map(
            lambda key: nys.factorize(a, 3, key=key, passes=passes, oversampling=5, jackknife=True),
            keys,
        )

    f = run(jax.random.split(jax.random.key(2), 200))
    for vectors, estimated in ((f.left, f.deviations.left), (f.right, f.deviations.right)):
        projectors = np.einsum("kmi,kni->kimn", vectors, vectors)
        spread = np.sqrt(np.sum((projectors - projectors.mean(0)) ** 2, axis=(2, 3)).mean(0))
        typical = np.sqrt(np.mean(np.asarray(estimated) ** 2, axis=0))
        assert np.all(typical > 0.7 * spread)
        assert np.all(typical < 8 * spread + 1e-3)
