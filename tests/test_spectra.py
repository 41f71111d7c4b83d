"""spectra: the matrices have the spectra and bases that were asked for."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import KEY

import nyscaled as nys

SPECTRUM = [0.3, 2.0, 1.0]


def test_psd_has_the_spectrum_and_the_basis():
    a, basis = nys.spectra.psd(KEY, 30, SPECTRUM)
    chex.assert_trees_all_equal(a, a.T)
    values = np.linalg.eigvalsh(np.asarray(a, np.float64))
    np.testing.assert_allclose(values[-3:], sorted(SPECTRUM), rtol=1e-5)
    np.testing.assert_allclose(values[:-3], 0, atol=1e-6)
    np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(a @ basis, basis * np.array(SPECTRUM), atol=1e-6)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_rectangular_has_the_spectrum_and_the_bases(shape):
    a, left, right = nys.spectra.rectangular(KEY, *shape, SPECTRUM)
    values = np.linalg.svd(np.asarray(a, np.float64), compute_uv=False)
    np.testing.assert_allclose(values[:3], sorted(SPECTRUM)[::-1], rtol=1e-5)
    np.testing.assert_allclose(values[3:], 0, atol=1e-6)
    np.testing.assert_allclose(a @ right, left * np.array(SPECTRUM), atol=1e-6)
    np.testing.assert_allclose(a.T @ left, right * np.array(SPECTRUM), atol=1e-6)


def test_matrices_are_functions_of_the_key():
    first, again, other = (nys.spectra.psd(jax.random.key(k), 30, SPECTRUM)[0] for k in (1, 1, 2))
    chex.assert_trees_all_equal(first, again)
    assert jnp.linalg.norm(first - other) > 0.1


@pytest.mark.parametrize("name", ["fig1ab", "fig4a", "fig4b"])
def test_exactly_parametrized_matrices_of_the_paper(name):
    spectrum = nys.spectra.paper_spectrum(name)
    assert spectrum.shape == (20,)
    np.testing.assert_allclose(spectrum[[0, 1, 18, 19]], [1.0, 0.99, 0.82, 0.01])


def test_under_parametrized_matrix_of_the_paper():
    spectrum = nys.spectra.paper_spectrum("fig1c")
    assert spectrum.shape == (40,)
    np.testing.assert_allclose(spectrum[[0, 19, 20, 36]], [1.0, 0.81, 0.80, 0.64])
    np.testing.assert_allclose(spectrum[37:], [0.05, 0.025, 0.01])
    a, basis = nys.spectra.paper("fig1c", KEY, m=100)
    np.testing.assert_allclose(jnp.diag(basis.T @ a @ basis), spectrum, atol=2e-6)


def test_half_precision_is_refused():
    with pytest.raises(ValueError, match="spectrum has dtype bfloat16; expected float32"):
        nys.spectra.psd(jax.random.key(0), 5, [1.0], jnp.bfloat16)
