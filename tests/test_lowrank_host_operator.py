"""`lowrank.HostOperator`: a random test sees products that disagree, and passes sound ones."""

import numpy as np
import pytest
from host_cases import M, N, assert_products, matrix, operator, thin
from scipy.sparse.linalg import LinearOperator

import nyscaled as nys
from nyscaled.lowrank import HostOperator
from nyscaled.lowrank.host import as_input

WRONG_ADJOINTS = {
    "zero": lambda y: np.zeros((N, y.shape[1]), np.float32),
    "twice": lambda y: 2 * matrix().T @ y,
    "minus": lambda y: -matrix().T @ y,
    "one percent more": lambda y: np.float32(1.01) * (matrix().T @ y),
    "an entry that differs": lambda y: matrix().T @ y + 0.01 * np.eye(N, M, dtype=np.float32) @ y,
    "rows in another order": lambda y: (matrix().T @ y)[::-1],
    "of another matrix": lambda y: np.abs(matrix()).T @ y,
}


@pytest.mark.parametrize("order", ["times first", "adjoint first"])
@pytest.mark.parametrize("name", WRONG_ADJOINTS)
def test_products_that_disagree(name, order):
    a = operator(adjoint_times=WRONG_ADJOINTS[name])
    calls = [lambda: a.times(thin(N)), lambda: a.adjoint_times(thin(M))]
    first, second = calls if order == "times first" else calls[::-1]
    first()
    with pytest.raises(ValueError, match="products disagree: ⟨y, A x⟩ is"):
        second()


def test_the_transpose_in_place_of_the_adjoint():
    dense = matrix(np.complex64)
    a = operator(adjoint_times=lambda y: dense.T @ y, dtype=np.complex64)
    a.times(thin(N, np.complex64))
    with pytest.raises(ValueError, match="conjugate transpose"):
        a.adjoint_times(thin(M, np.complex64))


@pytest.mark.parametrize("scale", [1e-30, 1, 1e30])
def test_products_of_any_size_are_compared(scale):
    dense = np.float32(scale) * matrix()
    assert_products(operator(dense=dense), dense)
    wrong = operator(dense=dense, adjoint_times=lambda y: -dense.T @ y)
    wrong.times(thin(N))
    with pytest.raises(ValueError, match="products disagree"):
        wrong.adjoint_times(thin(M))


@pytest.mark.parametrize("size", [300, 2000])
@pytest.mark.parametrize("factor", [1.01, 1.1, -1])
def test_an_adjoint_that_is_a_little_wrong_is_seen_in_a_large_matrix(size, factor):
    """Of rank 5 and noise; without a scale of their own the products of unit vectors are small."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((size, 5)))[0] for _ in range(2))
    dense = (u @ v.T + 1e-3 * rng.standard_normal((size, size)) / size**0.5).astype(np.float32)
    a = HostOperator(
        lambda x: dense @ x, lambda y: np.float32(factor) * (dense.T @ y), dense.shape, dense.dtype
    )
    with pytest.raises(ValueError, match="products disagree"):
        nys.factorize(a, rank=5)


@pytest.mark.parametrize("dtype", [np.float32, np.complex64, np.float64])
@pytest.mark.parametrize("name", ["normal", "ones", "falling", "nearly ones"])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (2, 2), (40, 3), (3, 400)])
def test_sound_products_agree_whatever_the_matrix(dtype, name, m, n):
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((m, n))
    dense = {
        "normal": normal,
        "ones": np.ones((m, n)),
        "falling": normal * 10.0 ** -np.minimum(np.arange(n), 30),
        "nearly ones": 1 + 1e-3 * normal,
    }[name]
    if np.issubdtype(dtype, np.complexfloating):
        dense = dense * np.exp(1j * normal)
    dense = dense.astype(dtype)
    for k in (1, 2, 16):
        a = HostOperator(lambda x: dense @ x, lambda y: dense.conj().T @ y, (m, n), dtype)
        image = a.times(rng.standard_normal((n, k)).astype(dtype))
        a.adjoint_times(np.linalg.qr(image)[0].astype(dtype))


def test_products_in_double_precision_may_come_from_an_iterative_solver():
    dense = matrix(np.float64)
    noisy = (1 + 1e-10 * np.random.default_rng(0).standard_normal((N, M))) * dense.T
    a = operator(dense=dense, adjoint_times=lambda y: noisy @ y, dtype=np.float64)
    a.times(thin(N, np.float64))
    a.adjoint_times(thin(M, np.float64))


def test_sound_products_of_a_large_matrix_agree():
    """In float32, where sums of 10⁴ terms are rounded, and for the thin blocks of an iteration."""
    dense = np.random.default_rng(0).standard_normal((10_000, 500)).astype(np.float32)
    a = HostOperator(lambda x: dense @ x, lambda y: dense.T @ y, dense.shape, dense.dtype)
    q = np.linalg.qr(a.times(dense[:500, :4]))[0]
    a.adjoint_times(q)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (lambda x: np.ones((M, 1), np.float32), r"is \(7, 1\) float32; expected \(7, 3\) float32"),
        (lambda x: matrix(np.float64) @ x, r"is \(7, 3\) float64; expected \(7, 3\) float32"),
        (lambda x: [[1.0]], "is a list; expected a NumPy array"),
        (lambda x: np.nan * (matrix() @ x), "has NaN or Inf entries"),
        (lambda x: np.where(matrix() @ x > 0, np.float32(np.inf), 0), "has NaN or Inf entries"),
    ],
)
def test_products_that_are_wrong(times, message):
    with pytest.raises(ValueError, match=message):
        operator(times=times).times(thin(N))


def test_the_adjoint_that_an_operator_lacks():
    a = as_input("A", LinearOperator((M, N), matvec=lambda x: matrix() @ x, dtype=np.float32))
    a.times(thin(N))
    with pytest.raises(ValueError, match="A's product Aᴴ y failed"):
        a.adjoint_times(thin(M))
