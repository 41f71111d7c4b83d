"""nystrom with a tolerance: the rank that an error takes, its estimate, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FORMS, M
from test_nystrom import SPECTRA, error, hermitian, matrix

import nyscaled as nys
from nyscaled.lowrank import Status

EYE = jnp.eye(M)


def needed(values, tol):
    """The smallest rank whose best error is at most tol·‖A‖_F."""
    tails = np.sqrt(np.cumsum(np.sort(values**2))[::-1])
    return int(np.sum(tails > tol * tails[0]))


@pytest.mark.parametrize("tol", [0.3, 1e-2, 1e-4])
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.long_beyond(5)
def test_a_tolerance_is_met_by_about_the_smallest_rank(name, tol):
    a, values = matrix(name), SPECTRA[name]
    psd = nys.nystrom(a, tol=tol)
    rank, size = len(psd.eigenvalues), np.linalg.norm(values)
    assert error(psd, a) <= 1.05 * tol * size
    assert rank <= 1.1 * needed(values, tol) + 3
    assert int(psd.numerical_rank) == rank
    assert psd.status is Status.CONVERGED
    np.testing.assert_allclose(psd.vectors.T @ psd.vectors, np.eye(rank), atol=1e-5)


def test_what_rounding_leaves_ends_the_search():
    a, _ = nys.spectra.psd(jax.random.key(0), M, [3.0, 2.0, 1.0])
    psd = nys.nystrom(a, tol=1e-7)
    assert (int(psd.numerical_rank), len(psd.eigenvalues), int(psd.passes)) == (3, 3, 2)
    assert psd.status is Status.EXACT
    assert error(psd, a) < 1e-5


def test_the_estimate_is_rarely_below_the_error():
    a = matrix("slow")
    ratios = []
    for key in jax.random.split(jax.random.key(1), 40):
        psd = nys.nystrom(a, tol=0.03, key=key)
        ratios.append(float(psd.error_estimate / error(psd, a)))
    assert min(ratios) > 0.8
    assert np.mean(ratios) < 1.2


@pytest.mark.long
@pytest.mark.parametrize("tol", [0.5, 0.1])
def test_all_eigenvalues_are_equal(tol):
    """The Krylov space of the identity does not grow by itself."""
    psd = nys.nystrom(EYE, tol=tol)
    assert len(psd.eigenvalues) >= (1 - tol**2) * M - 0.01
    assert error(psd, EYE) <= 1.01 * tol * M**0.5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.long_beyond(1)
def test_other_forms_of_a_matrix(form):
    a = matrix("squares")
    psd, expected = nys.nystrom(FORMS[form](a), tol=1e-2), nys.nystrom(a, tol=1e-2)
    np.testing.assert_allclose(psd.eigenvalues, expected.eigenvalues, rtol=1e-4)
    assert error(psd, a) < 1e-2 * jnp.linalg.norm(a)


@pytest.mark.long
def test_a_hermitian_matrix():
    a, _ = hermitian()
    psd = nys.nystrom(a, tol=0.1)
    difference = a - psd.factor @ psd.factor.conj().T
    assert len(psd.eigenvalues) == needed(np.array([3.0, 2.0, 1.0, 0.5, 0.01]), 0.1)
    assert jnp.linalg.norm(difference) < 0.1 * jnp.linalg.norm(a)


def test_the_largest_rank_is_kept_to():
    a = matrix("harmonic")
    psd = nys.nystrom(a, tol=1e-3, max_rank=4)
    assert (len(psd.eigenvalues), psd.status) == (4, Status.MAX_RANK)
    assert error(psd, a) < 1.01 * np.linalg.norm(SPECTRA["harmonic"][4:])
    assert 0.9 < float(psd.error_estimate / error(psd, a)) < 1.1


@pytest.mark.parametrize("scale", [2.0**-98, 2.0**90])
def test_powers_of_two_change_nothing(scale):
    a = matrix("squares")
    one, other = nys.nystrom(a, tol=1e-2), nys.nystrom(scale * a, tol=1e-2)
    np.testing.assert_allclose(other.eigenvalues / scale, one.eigenvalues, rtol=1e-5)
    np.testing.assert_allclose(other.error_estimate / scale, one.error_estimate, rtol=1e-4)


KERNEL = nys.linalg.KernelMatrix(nys.linalg.kernels.gaussian(1.0), jnp.ones((9, 1)))
REFUSED = {
    "neither": (EYE, {}, "rank is None and tol is None; expected exactly one"),
    "both": (EYE, {"rank": 2, "tol": 0.1}, "rank is 2 and tol is 0.1"),
    "tol": (EYE, {"tol": 0.0}, "tol is 0; expected a number in"),
    "max_rank": (EYE, {"tol": 0.1, "max_rank": M + 1}, "max_rank is 61"),
    "max_rank with rank": (EYE, {"rank": 2, "max_rank": 3}, "max_rank is 3 and rank is 2"),
    "oversampling": (EYE, {"tol": 0.1, "oversampling": 4}, "oversampling is 4 and tol is"),
    "jackknife": (EYE, {"tol": 0.1, "jackknife": True}, "jackknife is True and tol is"),
    "passes": (EYE, {"tol": 0.1, "passes": 3}, "passes is 3 and tol is given; expected a rank"),
    "kernel": (KERNEL, {"tol": 0.1}, "tol is 0.1 for a KernelMatrix; expected a rank"),
    "passes of a kernel": (KERNEL, {"rank": 2, "passes": 3}, "passes is 3 and A is a KernelMatrix"),
    "max_rank of a kernel": (KERNEL, {"rank": 2, "max_rank": 3}, "max_rank is 3 and A is a Kernel"),
    "tiny numbers": (2.0**-120 * EYE, {"tol": 0.1}, "where float32 loses digits"),
    "tiny and rounded": (2.0**-120 * matrix("slow"), {"tol": 0.1}, "where float32 loses digits"),
    "empty": (EYE[:0, :0], {"tol": 0.1}, r"A has shape \(0, 0\); expected a matrix"),
    "indefinite": (EYE.at[0, 0].set(-9.0), {"tol": 0.1}, "A is not positive semidefinite"),
    "negative": (-EYE, {"tol": 0.1}, "A is not positive semidefinite"),
    "NaN": (EYE.at[0, 0].set(jnp.nan), {"tol": 0.1}, "A has NaN or Inf"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused(case):
    a, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        nys.nystrom(a, **options)


def test_a_tolerance_is_refused_under_jit():
    with pytest.raises(ValueError, match="A, tol or the key is traced; expected a rank"):
        jax.jit(lambda a: nys.nystrom(a, tol=0.1).vectors)(EYE)
