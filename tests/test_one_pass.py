"""`nys.lowrank.one_pass`: the error against theory, its estimate, streams and bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

import nyscaled as nys
from nyscaled.lowrank import RowBlocks, one_pass

M, N, RANK = 120, 80, 6
EXTRA = RANK + 5  # by default
I = np.arange(1, N + 1.0)  # noqa: E741
SPECTRA = {
    "1/i": 1 / I,
    "1/i²": I**-2,
    "slow exponential": 0.9**I,
    "fast exponential": 0.5**I,
    "step": np.where(I <= RANK, 1, 0.01),
    "step and tail": np.where(I <= RANK, 1, 0.1 / I**0.5),
}


@functools.cache
def matrix(name, dtype=np.float32):
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((rows, N)))[0] for rows in (M, N))
    if np.issubdtype(dtype, np.complexfloating):
        u = u * np.exp(2j * np.pi * rng.random((1, N)))
        u = np.fft.fft(u, axis=0, norm="ortho")
    return ((u * SPECTRA[name]) @ v.T).astype(dtype)


def blocks(a, height=50):
    return (a[i : i + height] for i in range(0, len(a), height))


def dense(f):
    left, s, right = (np.asarray(x, np.complex128) for x in (f.left, f.singular_values, f.right))
    return (left * s) @ right.conj().T


def error(f, a):
    return float(np.linalg.norm(dense(f) - a))


def best(name, rank):
    return float(np.linalg.norm(SPECTRA[name][rank:]))


@functools.cache
def draws(name, count=40):
    """Errors and their estimates under several keys."""
    a = matrix(name)
    factors = [one_pass(blocks(a), RANK, key=jax.random.key(i)) for i in range(count)]
    return np.array([(error(f, a), float(f.error_estimate)) for f in factors])


def squared_bound(name, width):
    """The bound of the expected squared error before the cut, by the best rank for it."""
    bounds = [
        (1 + 2 * width / (width - 2)) * (1 + r / (width - r - 1)) * best(name, r) ** 2
        for r in range(width - 1)
    ]
    return min(bounds)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.long
def test_the_error_is_within_the_bound_of_theory(name):
    a, width = matrix(name), RANK + EXTRA
    rounding = 1e-5 * np.linalg.norm(a)
    uncut = [
        error(one_pass(blocks(a), width, key=jax.random.key(i), oversampling=0), a)
        for i in range(10)
    ]
    assert np.mean(np.square(uncut)) <= 1.5 * squared_bound(name, width) + rounding**2
    errors = draws(name)[:, 0]
    assert errors.min() >= best(name, RANK) - rounding
    # The cut adds at most the best error, and the error before it once more.
    limit = best(name, RANK) + 2 * squared_bound(name, width) ** 0.5
    assert np.mean(errors) <= limit + rounding
    assert np.mean(errors) <= 2.2 * best(name, RANK) + rounding


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.long_beyond(1)
def test_the_estimate_is_unbiased_and_seldom_far_off(name):
    errors, estimates = draws(name).T
    ratios = estimates / errors
    assert 0.7 < np.mean(ratios**2) < 1.3
    assert np.sum(ratios < 0.5) <= 4  # of 40, where 2 % are expected at most
    assert np.sum(ratios > 2) == 0


def naive(a, key):
    """AΩ (ΨᴴAΩ)⁺ ΨᴴA, as it is written."""
    rng = np.random.default_rng(key)
    width = 2 * RANK + 5
    omega = rng.standard_normal((N, width)).astype(a.dtype)
    psi = rng.standard_normal((M, width + width // 2)).astype(a.dtype)
    image, sums = a @ omega, psi.T @ a
    return image @ (np.linalg.pinv(psi.T @ image, rcond=0) @ sums)


@pytest.mark.parametrize("height", [1, 7, 50, 1000])
def test_an_exact_rank_is_found_to_rounding(height):
    """The formula without the orthonormal basis fails here in float32."""
    a = (matrix("1/i")[:, :5] @ matrix("1/i")[:5]).astype(np.float32)
    size = np.linalg.norm(a)
    f = one_pass(blocks(a, height), RANK)
    assert error(f, a) <= 1e-5 * size
    assert np.linalg.norm(naive(a, 0) - a) > 0.01 * size  # the control
    assert f.error_estimate <= 1e-5 * size
    assert int(f.numerical_rank) == 5
    assert f.status is nys.lowrank.Status.EXACT
    assert int(f.passes) == 1


def test_factors_are_orthonormal_with_fixed_signs():
    f = one_pass(blocks(matrix("1/i")), RANK)
    assert f.left.shape == (M, RANK)
    assert f.right.shape == (N, RANK)
    for x in (f.left, f.right):
        np.testing.assert_allclose(x.T @ x, np.eye(RANK), atol=1e-5)
    assert np.all(np.diff(f.singular_values) <= 0)
    largest = np.argmax(np.abs(f.left), axis=0)
    assert np.all(np.asarray(f.left)[largest, range(RANK)] > 0)


def test_complex_matrices():
    a = matrix("1/i²", np.complex64)
    f = one_pass(blocks(a), RANK)
    assert error(f, a) <= 3 * best("1/i²", RANK)
    assert 0.4 < f.error_estimate / error(f, a) < 2


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_the_matrix_does_not_matter(scale):
    a = matrix("1/i")
    f, scaled = one_pass(blocks(a), RANK), one_pass(blocks(np.float32(scale) * a), RANK)
    for name in ("singular_values", "error_estimate", "norm_estimate"):
        np.testing.assert_allclose(getattr(scaled, name) / scale, getattr(f, name), rtol=1e-3)
    assert scaled.relative_error > 0


def test_where_blocks_begin_does_not_matter():
    a = matrix("1/i")
    whole = dense(one_pass([a], RANK))
    for height in (1, 50, M - 1):
        np.testing.assert_allclose(dense(one_pass(blocks(a, height), RANK)), whole, atol=1e-4)


def test_rows_beyond_one_draw_of_random_numbers():
    """More rows than are drawn at once, in blocks that do not divide them."""
    a = np.tile(matrix("fast exponential"), (80, 1))
    f = one_pass(blocks(a, 1111), RANK)
    assert error(f, a) <= 3 * 80**0.5 * best("fast exponential", RANK)


def test_the_same_key_gives_the_same_factors():
    a = matrix("1/i")
    first, second, other = (
        one_pass(blocks(a), RANK, key=jax.random.key(i)).left for i in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, second)
    assert np.any(first != other)


@pytest.mark.parametrize(
    "make",
    [
        lambda a: a,
        jnp.asarray,
        lambda a: RowBlocks(a, block_bytes=10_000),
        lambda a: [a[:10], a[10:10], a[10:]],
        lambda a: (jnp.asarray(block) for block in blocks(a)),
        scipy.sparse.csr_array,
        lambda a: a.astype(">f4"),
        lambda a: RowBlocks(lambda: blocks(a), shape=a.shape, dtype=a.dtype),
    ],
)
def test_forms_of_a_stream(make):
    a = matrix("fast exponential")
    assert error(one_pass(make(a), RANK), a) <= 3 * best("fast exponential", RANK)


def test_a_traced_stream_is_refused():
    a = matrix("1/i")
    message = "the stream is multiplied by NumPy and is traced by JAX"
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda a: one_pass(a, RANK))(a)
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda scale: scale * one_pass(blocks(a), RANK).left)(1.0)
    with pytest.raises(ValueError, match=message):
        jax.vmap(lambda key: one_pass(a, RANK, key=key))(jax.random.split(jax.random.key(0)))


def test_a_stream_is_read_once():
    a = RowBlocks(matrix("1/i"))
    one_pass(a, RANK)
    assert a.passes == 1


@pytest.mark.long
@pytest.mark.parametrize("rows", [1, 4, RANK + 1])
def test_few_rows_and_few_columns(rows):
    a = matrix("1/i")[:rows, :10]
    for b in (a, a.T):
        f = one_pass(blocks(b, 2), rank=1)
        assert f.left.shape == (len(b), 1)
        assert error(f, b) <= 1.05 * np.linalg.svd(b)[1][1:].sum() + 1e-5


@pytest.mark.long
def test_errors_near_the_largest_number_are_finite():
    """The norm of the products that measure the error is beyond it."""
    a = np.linalg.qr(np.random.default_rng(0).standard_normal((12, 12)))[0]
    small, large = (one_pass([(x * a).astype("f")], 3) for x in (1.0, 2.0**125))
    np.testing.assert_allclose(large.error_estimate * 2.0**-125, small.error_estimate, rtol=1e-5)


def test_the_zero_matrix():
    f = one_pass([np.zeros((9, 8), np.float32)], 2)
    assert error(f, 0) == 0
    assert f.relative_error == 0


WRONG = {
    "no rows": ([], 1, "the stream has no rows"),
    "a vector": ([np.ones(3, np.float32)], 1, r"block 0 has shape \(3,\)"),
    "integers": ([np.ones((3, 3), int)], 1, "block 0 has dtype int64"),
    "width": ([np.ones((3, 3), "f"), np.ones((3, 2), "f")], 1, r"block 1 have shape \(3, 2\)"),
    "nan": ([np.ones((3, 3), "f"), np.full((1, 3), np.nan, "f")], 1, "rows 3 … 4 have NaN or Inf"),
    "rank": ([np.ones((3, 5), "f")], 4, "rank is 4; expected 1 ≤ rank ≤ 3"),
    "rank 0": ([np.ones((3, 5), "f")], 0, "rank is 0; expected"),
    "raises": ((1 // i for i in range(2)), 1, "block 0 of the stream failed .ZeroDivisionError"),
    "tiny": ([2.0**-120 * np.ones((9, 9), "f")], 1, "where float32 loses digits"),
    "subnormal": ([2.0**-140 * np.ones((9, 9), "f")], 1, "where float32 loses digits"),
    "huge": ([2.0**126 * np.ones((9, 9), "f")], 1, "NaN or Inf entries, or .* products overflow"),
    "masked": (
        [np.ma.masked_less(np.eye(9, dtype="f"), 1)],
        1,
        "rows of block 0 are a MaskedArray",
    ),
    "a number": (3.0, 1, "the stream is a float; expected row blocks"),
}


@pytest.mark.parametrize("case", WRONG)
def test_streams_that_are_wrong(case):
    stream, rank, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        one_pass(stream, rank)
