"""`nys.factorize` of matrices that JAX traces: by rank and by tolerance."""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import sparse
from lowrank_cases import SPECTRA, best, error, matrix, orthonormality, parts

import nyscaled as nys

Status = nys.lowrank.Status
M, N, RANK = 120, 90, 10
HARMONIC = SPECTRA["harmonic"](N)


@pytest.fixture(scope="module")
def a():
    return matrix(M, N, HARMONIC)


@pytest.mark.parametrize("shape", [(M, N), (N, M)], ids=["tall", "wide"])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.long_beyond(2)
def test_six_passes_come_close_to_the_best_error(spectrum, shape):
    s = SPECTRA[spectrum](N)
    a = matrix(*shape, s)
    f = nys.factorize(a, RANK)
    left, singular_values, right = parts(f)
    assert (left.shape, right.shape) == ((shape[0], RANK), (shape[1], RANK))
    assert error(a, f) <= 1.02 * best(s, RANK) + 1e-5
    assert max(map(orthonormality, (left, right))) < 1e-5
    assert np.all(np.diff(singular_values) <= 0)
    assert int(f.passes) == 6
    if spectrum in ("harmonic", "fast"):  # where values of this size are apart
        np.testing.assert_allclose(singular_values[:5], s[:5], rtol=1e-3)


@pytest.mark.long
def test_more_passes_come_closer(a):
    excess = [
        error(a, nys.factorize(a, RANK, passes=p)) - best(HARMONIC, RANK) for p in range(2, 7)
    ]
    assert all(x > 1.5 * y for x, y in zip(excess, excess[2:], strict=False))
    assert [int(nys.factorize(a, RANK, passes=p).passes) for p in (2, 3, 5)] == [2, 3, 5]


@pytest.mark.long
@pytest.mark.parametrize("shape", [(M, N), (N, M)], ids=["tall", "wide"])
@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_an_odd_number_of_passes(shape, dtype):
    """The projection is onto the shorter side, and images that are rounding are taken apart."""
    for s in (np.geomspace(1, 1e-6, N), 0.5 ** np.arange(N), np.where(np.arange(N) < 20, 1.0, 0)):
        a = matrix(*shape, s, dtype)
        f = nys.factorize(a, RANK, passes=5)
        left, singular_values, right = parts(f)
        assert int(f.passes) == 5
        assert error(a, f) <= best(s, RANK) + 1e-5
        assert max(map(orthonormality, (left, right))) < 1e-5
        np.testing.assert_allclose(singular_values, s[:RANK], atol=1e-5)
        assert 0.5 <= float(f.error_estimate) / error(a, f) <= 2


@pytest.mark.long
def test_two_passes_are_the_range_projection_of_theorem_3(a):
    """ScaledGD at η = 1 from AΩ is P_range(AΩ) A, of which this is the best part of rank r."""
    f = nys.factorize(a, RANK, passes=2, oversampling=0)
    x, y = nys.initializers.nystrom_factors(jax.random.key(0), a, RANK)
    step = nys.solvers.scaled_step(nys.problems.Asymmetric(a), learning_rate=1.0)
    x, y = nys.solvers.run(step, nys.Factors(x, y), 1).params
    # Not the same Ω, so the errors are alike and not equal; both are far from the best.
    ratio = np.linalg.norm(a - x @ y.T) / error(a, f)
    assert 0.8 < ratio < 1.25
    assert error(a, f) > 1.1 * best(HARMONIC, RANK)


@pytest.mark.parametrize("condition", [1e1, 1e4])
@pytest.mark.long_beyond(1)
def test_a_matrix_of_this_rank_takes_two_passes_and_is_exact(condition):
    s = np.zeros(N)
    s[:RANK] = np.geomspace(1, 1 / condition, RANK)
    a = matrix(M, N, s)
    # What the first block leaves out is a fifth of the limit with this key; with others, up to all.
    f = nys.factorize(a, RANK, key=jax.random.key(4))
    assert (int(f.passes), f.status, int(f.numerical_rank)) == (2, Status.EXACT, RANK)
    assert error(a, f) < 3e-6
    assert float(f.relative_error) < 3e-5


def test_a_rank_that_the_matrix_does_not_have_is_said():
    f = nys.factorize(matrix(M, N, np.where(np.arange(N) < 4, 1.0, 0)), RANK)
    assert (int(f.numerical_rank), f.status) == (4, Status.EXACT)
    assert orthonormality(f.left[:, :4]) < 1e-5
    assert not np.any(f.left[:, 4:])
    assert not np.any(f.singular_values[4:])
    zero = nys.factorize(np.zeros((6, 5), np.float32), 2)
    assert (int(zero.numerical_rank), float(zero.error_estimate)) == (0, 0)


def few_values(kind, m, n):
    """Matrices whose columns are sums of numbers of one sign; their rank is at most 5."""
    rng = np.random.default_rng(0)
    if kind == "ones":
        return np.ones((m, n), np.float32)
    if kind == "blocks":
        return np.kron(rng.random((4, 4)), np.ones((m // 4, n // 4))).astype(np.float32)
    rows = np.eye(5)[rng.integers(0, 5, m)]
    columns = rng.standard_normal((5, n)) if kind == "steps" else np.eye(5, n)
    return (rows @ columns).astype(np.float32)


@pytest.mark.long
@pytest.mark.parametrize("shape", [(1000, 8), (8, 1000), (4000, 60)], ids=str)
@pytest.mark.parametrize("kind", ["ones", "blocks", "one-hot", "steps"])
@pytest.mark.parametrize("options", [{"rank": 6}, {"rank": 6, "passes": 2}, {"tol": 1e-4}], ids=str)
def test_sums_of_numbers_of_one_sign(kind, shape, options):
    """Their Gram matrices have errors that grow with the number of rows."""
    a = few_values(kind, *shape)
    rank, size = np.linalg.matrix_rank(a), np.linalg.norm(a)
    f = nys.factorize(a, **options)
    assert error(a, f) < 1e-4 * size
    assert int(f.numerical_rank) == rank
    assert np.isfinite(float(f.error_estimate))
    under_jit = jax.jit(lambda a: nys.factorize(a, 5).singular_values)(a)
    np.testing.assert_allclose(under_jit, nys.factorize(a, 5).singular_values, atol=1e-4 * size)


@pytest.mark.long
def test_what_is_cut_for_being_small_is_in_the_estimate():
    """Many values just below the cut of the numerical rank are not small together."""
    s = np.where(np.arange(N) < 1, 1.0, 1.5e-6)
    a = matrix(M, N, s)
    for options in ({"rank": N - 5}, {"tol": 1e-6}, {"rank": RANK}):
        f = nys.factorize(a, **options)
        assert float(f.error_estimate) > 0.5 * error(a, f)
    f = nys.factorize(a, tol=1e-6)
    assert (f.status == Status.CONVERGED) <= (float(f.relative_error) <= 1e-6)


def test_two_passes_over_a_complete_space_leave_nothing_out():
    a = matrix(M, 12, np.linspace(1, 0.5, 12))
    f = nys.factorize(a, 12, passes=2)
    assert error(a, f) < 1e-5
    assert float(f.relative_error) < 1e-5


def test_the_estimate_of_an_exact_rank_is_not_that_of_probes_in_the_basis():
    """What is beyond rank 10 has the size of rounding, but is more than that of its basis."""
    s = np.where(np.arange(N) < RANK, 1.0, 1e-7)
    a, passes = matrix(M, N, s), []
    for seed in range(8):  # of some keys the first block does not show the rank
        f = nys.factorize(a, RANK, key=jax.random.key(seed))
        assert f.status is Status.EXACT
        assert float(f.error_estimate) > 0.5 * best(s, RANK)
        passes.append(int(f.passes))
    assert 2 in passes


@pytest.mark.long
@pytest.mark.parametrize("form", [jnp.asarray, nys.lowrank.RowBlocks])
def test_a_rank_that_is_exact_but_for_rounding_is_said_for_every_key(form):
    """Of some keys the first block shows it; its own estimate may lie on either side of a limit."""
    a = form(matrix(M, N, np.where(np.arange(N) < 6, 1.0, 5e-7)))
    for seed in range(16):
        assert nys.factorize(a, 6, key=jax.random.key(seed)).status is Status.EXACT, seed
    assert nys.factorize(a, 5).status is Status.RANK_REACHED


@pytest.mark.long
@pytest.mark.parametrize("passes", [3, 4])
def test_one_block_and_two_of_more_than_64_columns(a, passes):
    rank = 64
    factorize = functools.partial(nys.factorize, rank=rank, passes=passes)
    f = factorize(a, jackknife=True)
    assert (f.left.shape, f.right.shape) == ((M, rank), (N, rank))
    assert f.deviations.left.shape == (rank,)
    assert error(a, f) < 1.3 * best(HARMONIC, rank)
    np.testing.assert_allclose(
        jax.jit(factorize)(a).singular_values, f.singular_values, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("size", [1e-40, 1e-35])
def test_numbers_that_lose_digits_are_refused(a, size):
    with pytest.raises(ValueError, match="where float32 loses digits"):
        nys.factorize((a.astype(np.float64) * size).astype(np.float32), 3)


@pytest.mark.long_beyond(2)
@pytest.mark.parametrize("options", [{"rank": 3}, {"tol": 0.1}])
@pytest.mark.parametrize(
    "form",
    [
        scipy.sparse.csr_array,
        lambda a: sparse.BCOO(
            (jnp.asarray(a.diagonal().astype(jnp.bfloat16)), jnp.array(2 * [range(9)]).T),
            shape=a.shape,
        ),
        nys.lowrank.RowBlocks,
        lambda a: nys.lowrank.HostOperator(lambda x: a @ x, lambda y: a.T @ y, a.shape, a.dtype),
    ],
    ids=["sparse", "half", "stream", "operator"],
)
def test_the_smallest_numbers_are_not_zeros(form, options):
    """XLA takes them as zero, and NumPy does not."""
    with pytest.raises(ValueError, match="where float32 loses digits"):
        nys.factorize(form(np.float32(1e-39) * np.eye(9, dtype=np.float32)), **options)
    f = nys.factorize(form(np.zeros((9, 9), np.float32)), **options)
    assert float(f.norm_estimate) == 0


def test_a_rank_may_be_an_integer_of_numpy_or_jax(a):
    expected = nys.factorize(a, 3).singular_values
    for rank in (np.int64(3), jnp.asarray(3)):
        np.testing.assert_array_equal(nys.factorize(a, rank).singular_values, expected)


@pytest.mark.parametrize("tol", [0.5, 0.2, 1e-2, 1e-7])
@pytest.mark.parametrize("shape", [(M, N), (N, M)], ids=["tall", "wide"])
@pytest.mark.long_beyond(2)
def test_a_tolerance_is_met_by_about_the_smallest_rank(shape, tol):
    s = 0.9 ** np.arange(N)
    a = matrix(*shape, s)
    f = nys.factorize(a, tol=tol)
    size = np.linalg.norm(s)
    assert error(a, f) <= max(1.05 * tol, 1e-5) * size
    rank, needed = len(f.singular_values), int(np.sum([best(s, r) > tol * size for r in range(N)]))
    assert rank <= 1.1 * needed + 2
    assert f.status == (Status.EXACT if tol == 1e-7 else Status.CONVERGED)


def test_a_tolerance_beyond_the_largest_rank(a):
    f = nys.factorize(a, tol=0.05, max_rank=5)
    assert (len(f.singular_values), f.status) == (5, Status.MAX_RANK)
    assert error(a, f) <= 1.01 * best(HARMONIC, 5)
    assert float(f.relative_error) > 0.05


@pytest.mark.parametrize("size", [1, 20, 50])
@pytest.mark.long_beyond(1)
def test_a_tolerance_for_a_matrix_whose_singular_values_are_all_equal(size):
    """A Krylov space of the identity does not grow by itself."""
    f = nys.factorize(np.eye(size, dtype=np.float32), tol=0.3)
    kept = len(f.singular_values)
    assert kept >= (1 - 0.3**2) * size - 0.01
    assert error(np.eye(size), f) <= 0.31 * size**0.5


@pytest.mark.long
def test_complex_matrices_use_adjoints():
    a = matrix(M, N, HARMONIC, np.complex64)
    for given_a, scale in ((a, 1), (a.conj().T, 1j)):
        f = nys.factorize(scale * given_a, RANK)
        assert f.left.dtype == jnp.complex64
        assert f.singular_values.dtype == jnp.float32
        assert error(scale * given_a, f) < 1.01 * best(HARMONIC, RANK)
    assert error(a, nys.factorize(a, tol=0.2)) < 0.21 * np.linalg.norm(HARMONIC)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.long_beyond(1)
def test_half_precision_is_summed_in_float32(a, dtype):
    half = jnp.asarray(a, dtype)
    f = nys.factorize(half, RANK)
    assert f.left.dtype == jnp.float32
    exact = nys.factorize(half.astype(jnp.float32), RANK)
    np.testing.assert_allclose(f.singular_values, exact.singular_values, rtol=1e-4)


@pytest.mark.parametrize("form", ["bcoo", "bcsr", "scipy", "operator"])
@pytest.mark.long
def test_other_forms_of_a_matrix(form):
    entries = scipy.sparse.random(
        M, N, 0.1, dtype=np.float32, random_state=np.random.default_rng(0)
    )
    dense = entries.toarray()
    a = {
        "bcoo": sparse.BCOO.from_scipy_sparse(entries),
        "bcsr": sparse.BCSR.from_scipy_sparse(entries.tocsr()),
        "scipy": entries,
        "operator": nys.linalg.Operator(lambda x: dense @ x, lambda y: dense.T @ y, (M, N)),
    }[form]
    for options in ({"rank": RANK}, {"tol": 0.4}):
        f, expected = nys.factorize(a, **options), nys.factorize(dense, **options)
        assert f.left.shape == expected.left.shape
        np.testing.assert_allclose(f.singular_values, expected.singular_values, rtol=1e-4)


def test_the_largest_entry_of_each_left_vector_is_positive(a):
    for b in (a, a.T):
        left = np.asarray(nys.factorize(b, RANK).left)
        assert np.all(left[np.argmax(np.abs(left), axis=0), np.arange(RANK)] > 0)


def test_a_key_gives_the_same_result_to_the_last_bit_from_any_thread(a):
    results = {}

    def run(name):
        results[name] = nys.factorize(a, RANK, key=jax.random.key(3))

    run("main")
    thread = threading.Thread(target=run, args=("other",))
    thread.start()
    thread.join()
    for x, y in zip(parts(results["main"]), parts(results["other"]), strict=True):
        assert np.array_equal(x, y)
    other = nys.factorize(a, RANK, key=jax.random.key(4))
    assert not np.array_equal(other.left, results["main"].left)


@settings(max_examples=10, deadline=None)
@given(exponent=st.integers(-90, 110))
def test_a_power_of_two_goes_through(exponent):
    a = matrix(30, 20, SPECTRA["harmonic"](20))
    f, scaled = nys.factorize(a, 3), nys.factorize(np.ldexp(a, exponent), 3)
    for name in ("singular_values", "error_estimate", "norm_estimate"):
        np.testing.assert_allclose(
            np.ldexp(np.float64(getattr(scaled, name)), -exponent), getattr(f, name), rtol=1e-5
        )


@pytest.mark.long
def test_under_vmap_and_jit(a):
    batch = jnp.stack([a, 2 * a, jnp.asarray(matrix(M, N, SPECTRA["fast"](N)))])
    f = jax.jit(jax.vmap(lambda a: nys.factorize(a, RANK)))(batch)
    for i, b in enumerate(batch):
        single = nys.factorize(b, RANK)
        np.testing.assert_allclose(f.singular_values[i], single.singular_values, atol=1e-5)
        np.testing.assert_allclose(f.error_estimate[i], single.error_estimate, atol=1e-5)
        np.testing.assert_allclose(f.left[i], single.left, atol=2e-3)
    swapped = f.adjoint
    right = np.asarray(swapped.left)
    peaks = np.take_along_axis(right, np.abs(right).argmax(axis=1, keepdims=True), 1)
    assert np.all(peaks > 0)
    np.testing.assert_allclose(
        (swapped.left * swapped.singular_values[:, None]) @ swapped.right.swapaxes(1, 2),
        ((f.left * f.singular_values[:, None]) @ f.right.swapaxes(1, 2)).swapaxes(1, 2),
        atol=1e-5,
    )


def test_nothing_is_compiled_again_for_another_matrix_or_key(a):
    from nyscaled.lowrank.by_rank import _end_compiled

    nys.factorize(a, 7)
    size = _end_compiled._cache_size()
    nys.factorize(2 * a, 7, key=jax.random.key(5))
    assert _end_compiled._cache_size() == size


@pytest.mark.long
def test_deviations_grow_towards_what_is_not_determined(a):
    passes = (2, 3, 5, 6)
    moved = [nys.factorize(a, 5, passes=p, jackknife=True).deviations for p in passes]
    for sides in moved:
        for side in sides:
            assert side[0] < side[2] < side[4]
    for few, many in zip(moved, moved[2:], strict=False):
        assert np.all(many.left < 0.3 * few.left)
        assert np.all(many.right < 0.3 * few.right)
    assert nys.factorize(a, 5).deviations is None


def reference(a, rank, weights):
    u, s, vt = jnp.linalg.svd(a, full_matrices=False)
    return jnp.sum((u[:, :rank] * s[:rank]) @ vt[:rank] * weights)


@pytest.mark.long
def test_derivatives_of_values_and_of_the_projected_matrix():
    a = jnp.asarray(matrix(30, 20, SPECTRA["harmonic"](20)))
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(a.shape), jnp.float32)

    def projected(a):
        f = nys.factorize(a, 4, passes=10)
        return jnp.sum((f.left * f.singular_values) @ f.right.T * weights)

    expected = jax.grad(reference)(a, 4, weights)
    np.testing.assert_allclose(jax.grad(projected)(a), expected, atol=3e-4)
    tangent = jax.jvp(projected, (a,), (weights,))[1]
    np.testing.assert_allclose(tangent, jnp.sum(expected * weights), rtol=1e-3)
    gradient = jax.grad(lambda a: nys.factorize(a, 4, passes=10).singular_values.sum())(a)
    u, _, vt = np.linalg.svd(a)
    np.testing.assert_allclose(gradient, u[:, :4] @ vt[:4], atol=1e-4)
