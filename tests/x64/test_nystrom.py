"""nystrom and pivoted_cholesky in float64: the same to more digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nyscaled as nys

KEY = jax.random.key(0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_exact_rank_is_found_to_rounding(dtype):
    a, _ = nys.spectra.psd(KEY, 60, np.geomspace(1, 1e-3, 4), jnp.dtype(dtype))
    psd = nys.nystrom(a, rank=6, oversampling=4)
    eps = float(jnp.finfo(dtype).eps)
    assert psd.vectors.dtype == psd.error_estimate.dtype == dtype
    assert int(psd.numerical_rank) == 4
    error = np.linalg.norm(np.asarray(a, np.float64) - np.asarray(psd.factor @ psd.factor.T))
    assert error < 100 * eps
    assert float(psd.error_estimate) < 1e4 * eps


def test_a_smooth_kernel_has_a_rank_that_grows_with_the_digits():
    points = jnp.linspace(0, 3, 200)[:, None]
    ranks, traces = {}, {}
    for dtype in ("float32", "float64"):
        a = nys.linalg.KernelMatrix(nys.linalg.kernels.gaussian(1.0), points.astype(dtype))
        f = nys.lowrank.pivoted_cholesky(a, 40, key=KEY)
        assert f.factor.dtype == dtype
        assert jnp.all(jnp.isfinite(f.factor))
        ranks[dtype], traces[dtype] = int(f.numerical_rank), float(jnp.sum(f.residual))
    assert ranks["float32"] < ranks["float64"] < 40
    assert traces["float64"] < 200 * 1e-13 < 200 * 1e-8 < traces["float32"] + 200 * 1e-7


def test_the_preconditioner_reaches_the_digits_of_float64():
    a, _ = nys.spectra.psd(KEY, 100, 0.8 ** np.arange(100))

    def shifted(x):
        return a @ x + 1e-8 * x

    b = shifted(jax.random.normal(KEY, (100,)))
    inverse = nys.lowrank.nystrom_preconditioner(nys.nystrom(a, 80), 1e-8)
    x, _ = jax.scipy.sparse.linalg.cg(shifted, b, tol=1e-12, maxiter=20, M=inverse)
    assert jnp.linalg.norm(shifted(x) - b) < 1e-11 * jnp.linalg.norm(b)


def test_a_tolerance_beyond_the_digits_of_float32():
    values = 0.5 ** np.arange(60)
    a, _ = nys.spectra.psd(KEY, 60, values)
    psd = nys.nystrom(a, tol=1e-10)
    error = np.linalg.norm(a - psd.factor @ psd.factor.T) / np.linalg.norm(values)
    assert error < 1e-10
    assert len(psd.eigenvalues) < 40
