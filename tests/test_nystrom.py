"""nystrom: eigenpairs of PSD matrices, the leave-one-out estimate, the jackknife, refusals."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from cases import FORMS, KEY, M, N
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from test_lowering import assert_full_precision

import nyscaled as nys
from nyscaled.lowrank import RowBlocks, Status

RANK, OVERSAMPLING = 4, 4
INDEX = np.arange(1, M + 1)
SPECTRA = {
    "harmonic": 1 / INDEX,
    "squares": 1 / INDEX**2,
    "halves": 0.5**INDEX,
    "slow": 0.9**INDEX,
    "flat with noise": np.where(INDEX <= RANK, 1, 0.01),
    "a step late": np.where(INDEX <= 2 * RANK, 1, 0.01),
}
nystrom = functools.partial(nys.nystrom, rank=RANK, oversampling=OVERSAMPLING)


def matrix(name, seed=0):
    return nys.spectra.psd(jax.random.key(seed), M, SPECTRA[name])[0]


def error(psd, a):
    return jnp.linalg.norm(a - jnp.matmul(psd.factor, psd.factor.T, precision="highest"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.long_beyond(1)
def test_eigenpairs_are_those_of_the_matrix(form):
    a, basis = nys.spectra.psd(KEY, M, [3.0, 2.0, 1.0, 0.5, 0.01])
    psd = nystrom(FORMS[form](a))
    chex.assert_trees_all_close(psd.eigenvalues, jnp.array([3.0, 2.0, 1.0, 0.5]), atol=1e-5)
    chex.assert_trees_all_close(jnp.abs(psd.vectors.T @ basis[:, :4]), jnp.eye(4), atol=1e-5)
    chex.assert_trees_all_close(psd.vectors.T @ psd.vectors, jnp.eye(4), atol=1e-5)
    chex.assert_trees_all_close(error(psd, a), 0.01, rtol=1e-2)
    chex.assert_trees_all_close(psd.error_estimate, 0.01, rtol=0.1)
    assert (int(psd.passes), int(psd.numerical_rank), psd.status) == (3, 4, 0)


def half_operator(a, _):
    """An operator whose products are in half precision, for operands of any dtype."""
    half = jnp.asarray(a, jnp.bfloat16)

    def product(x):
        return (half @ x).astype(half.dtype)

    return nys.linalg.Operator(product, product, half.shape, half.dtype)


def memory_map(a, folder):
    np.save(folder / "a.npy", a)
    return np.load(folder / "a.npy", mmap_mode="r")


HOST = {
    "scipy": lambda a, _: scipy.sparse.csr_array(a),
    "an operator without adjoint": lambda a, _: LinearOperator(a.shape, lambda x: a @ x, dtype="f"),
    "a memory map": memory_map,
    "half precision in a file": lambda a, folder: memory_map(a.astype(np.float16), folder),
    "half precision": lambda a, _: jnp.asarray(a, jnp.bfloat16),
    "an operator in half precision": half_operator,
    "a complex stream": lambda a, _: RowBlocks(a.astype(np.complex64), block_bytes=2**12),
    "double precision": lambda a, _: aslinearoperator(a.astype(np.float64)),
}


@pytest.mark.long
@pytest.mark.parametrize("form", HOST)
@pytest.mark.parametrize("options", [{"rank": RANK}, {"tol": 0.1}])
def test_matrices_that_jax_does_not_hold(form, options, tmp_path):
    a, basis = nys.spectra.psd(KEY, M, [3.0, 2.0, 1.0, 0.5, 0.05])
    psd = nys.nystrom(HOST[form](np.asarray(a), tmp_path), **options)
    digits = 0.03 if "half" in form else 1e-5
    np.testing.assert_allclose(psd.eigenvalues, [3.0, 2.0, 1.0, 0.5], atol=digits)
    np.testing.assert_allclose(np.abs(psd.vectors.T @ basis[:, :4]), np.eye(4), atol=digits)
    assert psd.vectors.dtype == (jnp.complex64 if "complex" in form else jnp.float32)
    assert np.sum(np.asarray(psd.eigenvalues) > 0) == int(psd.numerical_rank)
    assert 0.04 < psd.error_estimate < 0.3


@pytest.mark.long
@pytest.mark.parametrize("function", [nys.factorize, nys.nystrom])
def test_an_operator_without_arrays_of_its_own_is_traced(function):
    a = matrix("squares")
    operator = nys.linalg.Operator(lambda x: a @ x, lambda y: a.T @ y, a.shape)
    estimate = jax.jit(lambda scale: scale * function(operator, rank=RANK).error_estimate)
    np.testing.assert_allclose(estimate(2.0), 2 * function(operator, rank=RANK).error_estimate)


@pytest.mark.long
def test_a_stream_is_read_once_per_pass():
    """Whether it is Hermitian, finite and not zero is seen in the first pass."""
    a = np.asarray(matrix("squares"))
    stream = RowBlocks(a, block_bytes=2**12)
    psd = nystrom(stream, passes=2)
    assert stream.passes == int(psd.passes) == 2
    chex.assert_trees_all_close(psd.eigenvalues, nystrom(a, passes=2).eigenvalues, rtol=1e-5)


@pytest.mark.long_beyond(2)
@pytest.mark.parametrize("name", SPECTRA)
def test_three_passes_are_near_the_best_rank_and_one_is_not(name):
    a = matrix(name)
    best = np.linalg.norm(SPECTRA[name][RANK:])
    worst = {
        p: max(error(nystrom(a, key=jax.random.key(i), passes=p), a) for i in range(3))
        for p in (1, 3)
    }
    assert worst[3] <= 1.05 * best
    assert worst[1] > worst[3]


def hermitian(values=(3.0, 2.0, 1.0, 0.5, 0.01)):
    draws = jax.random.normal(KEY, (M, len(values)), jnp.complex64)
    basis = np.linalg.qr(np.asarray(draws))[0]
    return jnp.asarray((basis * np.array(values, np.float32)) @ basis.conj().T), basis


@pytest.mark.long
@pytest.mark.parametrize("passes", [1, 3])
def test_a_hermitian_matrix_is_multiplied_by_adjoints(passes):
    a, basis = hermitian()
    psd = nystrom(a, passes=passes, jackknife=True)
    overlaps = jnp.abs(psd.vectors.conj().T @ basis[:, :4])
    chex.assert_trees_all_close(psd.eigenvalues, jnp.array([3.0, 2.0, 1.0, 0.5]), atol=1e-5)
    chex.assert_trees_all_close(overlaps, jnp.eye(4), atol=1e-4)
    chex.assert_trees_all_close(
        jnp.linalg.norm(a - psd.factor @ psd.factor.conj().T), 0.01, rtol=0.1
    )
    assert 0.009 < psd.error_estimate < 0.02
    assert jnp.all(psd.deviations < 0.05)
    peaks = jnp.take_along_axis(psd.vectors, jnp.abs(psd.vectors).argmax(0, keepdims=True), 0)
    chex.assert_trees_all_close(peaks, jnp.abs(peaks).astype(peaks.dtype), atol=1e-6)


# --- The estimate --------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(1, 2))
def ratios(a, count, passes):
    """The estimate over the error, of so many draws."""

    def ratio(key):
        psd = nystrom(a, key=key, passes=passes)
        return psd.error_estimate / error(psd, a)

    return jax.lax.map(ratio, jax.random.split(KEY, count))


# How often the estimate is below half the error and below nine tenths of it, of all draws.
ALLOWED = {1: (0.03, 0.25), 3: (0.0, 0.005)}


@pytest.mark.parametrize(
    ("name", "count"),
    [("slow", 100), *(pytest.param(name, 2000, marks=pytest.mark.long) for name in SPECTRA)],
)
@pytest.mark.parametrize("passes", ALLOWED)
def test_the_estimate_is_rarely_below_the_error(name, count, passes):
    ratio = np.asarray(ratios(matrix(name), count, passes))
    half, most = ALLOWED[passes]
    assert np.mean(ratio < 0.5) <= half
    assert np.mean(ratio < 0.9) <= most
    assert np.mean(ratio) < 2


def test_the_estimate_is_for_the_matrix_and_not_for_its_image():
    """The residual of the columns of Ω themselves is rounding: it is what leaving out is for."""
    a = matrix("slow")
    psd = nystrom(a, passes=1, rank=8, oversampling=0)
    omega = jax.random.normal(KEY, (M, 8))  # the draw of `nystrom`
    residual = jnp.linalg.norm((a - psd.factor @ psd.factor.T) @ omega) / 8**0.5
    assert residual < 1e-4 * psd.error_estimate


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.long_beyond(1)
def test_the_jackknife_is_about_the_deviation_of_each_vector(passes):
    a = matrix("squares")

    @jax.jit
    @jax.vmap
    def draws(key):
        psd = nystrom(a, rank=2, key=key, passes=passes, jackknife=True)
        return psd.vectors, psd.deviations

    vectors, deviations = draws(jax.random.split(KEY, 200))
    projectors = jnp.einsum("dmr,dnr->drmn", vectors, vectors)
    spread = jnp.sqrt(jnp.mean(jnp.sum((projectors - projectors.mean(0)) ** 2, (2, 3)), 0))
    estimates = jnp.sqrt(jnp.mean(deviations**2, axis=0))
    # On average the jackknife is never too small, for one column less.
    assert jnp.all(estimates > spread)
    assert jnp.all(estimates < 10 * spread)
    assert nystrom(a).deviations is None


# --- What is returned ----------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [1, 3])
def test_a_rank_that_the_matrix_does_not_have_is_returned_as_zeros(passes):
    a, basis = nys.spectra.psd(KEY, M, [2.0, 1.0])
    psd = nystrom(a, passes=passes)
    assert int(psd.numerical_rank) == 2
    assert not jnp.any(psd.eigenvalues[2:])
    assert not jnp.any(psd.vectors[:, 2:])
    chex.assert_trees_all_close(jnp.abs(psd.vectors[:, :2].T @ basis), jnp.eye(2), atol=1e-5)
    assert error(psd, a) < 2e-5
    assert psd.error_estimate < 1e-3
    exact = jnp.zeros((M, M)).at[0, 0].set(1.0)  # where products have rows of zeros
    assert int(nystrom(exact, passes=passes).numerical_rank) == 1


def test_a_small_matrix_is_decomposed_completely():
    a, _ = nys.spectra.psd(KEY, 6, [3.0, 2.0, 1.0, 0.5, 0.2, 0.1])
    psd = nystrom(a, rank=6)
    chex.assert_trees_all_close(psd.factor @ psd.factor.T, a, atol=2e-5)
    assert int(psd.passes) == 1
    for rank in (6, 3):
        psd = nystrom(a, rank=rank)
        assert abs(psd.error_estimate - error(psd, a)) < 2e-5


@pytest.mark.parametrize("scale", [2.0**-98, 2.0**90])
def test_powers_of_two_change_nothing(scale):
    a = matrix("squares")
    one, other = nystrom(a), nystrom(scale * a)
    chex.assert_trees_all_close(other.vectors, one.vectors, atol=1e-6)
    chex.assert_trees_all_close(other.eigenvalues / scale, one.eigenvalues, rtol=1e-5)
    chex.assert_trees_all_close(other.error_estimate / scale, one.error_estimate, rtol=1e-4)


@pytest.mark.long
def test_it_is_the_same_under_jit_and_vmap():
    stack = jnp.stack([matrix("slow"), matrix("squares")])
    batched = jax.jit(jax.vmap(lambda a: nystrom(a)))(stack)
    for i, a in enumerate(stack):
        single = nystrom(a)
        chex.assert_trees_all_close(batched.eigenvalues[i], single.eigenvalues, rtol=1e-4)
        chex.assert_trees_all_close(batched.factor[i], single.factor, atol=1e-4)


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize("form", FORMS)
def test_it_lowers_for_accelerators_in_full_precision(form):
    fn = functools.partial(nystrom, jackknife=True)
    assert_full_precision(fn, FORMS[form](matrix("slow")))


# --- What is refused -----------------------------------------------------------------------------

REFUSED = {
    "indefinite": (lambda a: a - 0.5 * jnp.eye(M), {}, "A is not positive semidefinite"),
    "negative": (lambda a: -a, {}, "A is not positive semidefinite"),
    "not symmetric": (lambda a: a.at[0, 1].add(1.0), {}, "A is not symmetric"),
    "not Hermitian": (lambda a: a * (1 + 1j), {}, "A is not Hermitian"),
    "rectangular": (lambda a: a[:, :N], {}, r"A has shape \(60, 40\); expected a square matrix"),
    "zero": (lambda a: 0 * a, {}, "A is the zero matrix"),
    "NaN": (lambda a: a.at[0, 0].set(jnp.nan), {}, "NaN or Inf entries"),
    "rank": (lambda a: a, {"rank": M + 1}, "rank is 61"),
    "oversampling": (lambda a: a, {"oversampling": -1}, "oversampling is -1"),
    "passes": (lambda a: a, {"passes": 0}, "passes is 0"),
}


@pytest.mark.parametrize("form", [lambda a: a, lambda a: RowBlocks(np.asarray(a))])
@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused(case, form):
    change, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        nystrom(form(change(matrix("slow"))), **options)


@pytest.mark.parametrize("options", [{"rank": 3}, {"tol": 1e-3}])
def test_numbers_that_become_infinite_later_are_refused(options):
    """The products of a matrix of the user's are not checked before."""

    class Broken:
        shape, dtype, count = (M, M), np.dtype("f"), 0

        def times(self, x):
            self.count += 1
            return np.diag(1 / np.float32(INDEX)) @ x * (np.inf if self.count > 1 else 1)

        adjoint_times = times

    with pytest.raises(ValueError, match="A has NaN or Inf entries, or its products overflow"):
        nys.nystrom(Broken(), **options)


def test_under_jit_the_status_says_it():
    status = jax.jit(lambda a: nystrom(a).status)
    a = matrix("slow")
    assert int(status(a)) == Status.RANK_REACHED
    assert int(status(-a)) == Status.INDEFINITE
    assert int(status(a.at[0, 0].set(jnp.nan))) == Status.NON_FINITE


def test_complex_eigenvalues_have_derivatives():
    rng = np.random.default_rng(0)
    root = (rng.normal(size=(2, 30, 30)) * np.geomspace(1, 1e-4, 30)).astype("f")
    root = jnp.asarray(root[0] + 1j * root[1])
    a = root @ root.conj().T
    values, change = jax.jvp(
        lambda t: nys.nystrom((1 + t) * a, rank=3, key=jax.random.key(0), passes=3).eigenvalues,
        (jnp.float32(0),),
        (jnp.float32(1),),
    )
    np.testing.assert_allclose(change, values, rtol=1e-3)
