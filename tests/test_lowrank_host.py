"""What `nys.factorize` takes: every form gives the products of the dense matrix."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from jax.experimental import sparse
from scipy.sparse.linalg import LinearOperator, aslinearoperator

import nyscaled as nys
from nyscaled.lowrank import HostOperator, RowBlocks
from nyscaled.lowrank.host import HostMatrix, SparseMatrix, as_input
from nyscaled.matrices import transpose_times

M, N, K = 7, 5, 3


def matrix(dtype=np.float32):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((M, N)) * (rng.random((M, N)) < 0.6)
    if np.issubdtype(dtype, np.complexfloating):
        a = a * np.exp(2j * np.pi * rng.random((M, N)))
    return a.astype(dtype)


def thin(rows, dtype=np.float32):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((rows, K, 2)).astype(np.float32).view(np.complex64)[..., 0]
    return (x if np.issubdtype(dtype, np.complexfloating) else x.real).astype(dtype)


def both(a, dtype=np.float32):
    """A x and Aᴴ y of what `as_input` returns."""
    x, y = thin(N, dtype), thin(M, dtype)
    if isinstance(a, HostMatrix):
        return a.times(x), a.adjoint_times(y)
    return a @ jnp.asarray(x), transpose_times(a, jnp.asarray(y).conj()).conj()


def assert_products(a, dense):
    dtype = np.complex64 if np.iscomplexobj(dense) else np.float32
    image, coimage = both(a, dtype)
    for got, expected in (
        (image, dense @ thin(N, dtype)),
        (coimage, dense.conj().T @ thin(M, dtype)),
    ):
        assert np.max(np.abs(got - expected)) <= 1e-5 * np.max(np.abs(expected))


def lineax_operator(dense):
    lineax = pytest.importorskip("lineax")

    return lineax.MatrixLinearOperator(jnp.asarray(dense))


def lineax_function(dense):
    lineax = pytest.importorskip("lineax")

    dense = jnp.asarray(dense)
    return lineax.FunctionLinearOperator(
        lambda x: dense @ x, jax.ShapeDtypeStruct((N,), dense.dtype)
    )


def pylops_operator(dense):
    pylops = pytest.importorskip("pylops")

    return pylops.MatrixMult(dense, dtype=dense.dtype)


HOST = {
    "scipy csr array": scipy.sparse.csr_array,
    "scipy csc matrix": scipy.sparse.csc_matrix,
    "scipy coo": scipy.sparse.coo_array,
    "bcoo": lambda a: sparse.BCOO.fromdense(jnp.asarray(a)),
    "bcoo padded": lambda a: sparse.BCOO.fromdense(jnp.asarray(a), nse=40),
    "bcoo of rows": lambda a: sparse.BCOO.fromdense(jnp.asarray(a), n_batch=1),
    "bcsr": lambda a: sparse.BCSR.fromdense(jnp.asarray(a)),
    "scipy operator": aslinearoperator,
    "pylops": pylops_operator,
    "functions": lambda a: HostOperator(
        lambda x: a @ x, lambda y: a.conj().T @ y, a.shape, a.dtype
    ),
}
TRACED = {
    "numpy": np.asarray,
    "jax": jnp.asarray,
    "operator": lambda a: nys.linalg.Operator(lambda x: a @ x, lambda y: a.T @ y, a.shape, a.dtype),
    "lineax": lineax_operator,
    "lineax function": lineax_function,
}


@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
@pytest.mark.parametrize("form", HOST)
@pytest.mark.long_beyond(3)
def test_products_on_the_host(form, dtype):
    dense = matrix(dtype)
    a = as_input("A", HOST[form](dense))
    assert isinstance(a, HostMatrix)
    assert (a.shape, a.dtype) == ((M, N), dtype)
    assert all(isinstance(product, np.ndarray) for product in both(a, dtype))
    assert_products(a, dense)


@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
@pytest.mark.parametrize("form", TRACED)
def test_products_that_jax_traces(form, dtype):
    dense = matrix(dtype)
    a = as_input("A", TRACED[form](dense))
    assert not isinstance(a, HostMatrix)
    assert (a.shape, a.dtype) == ((M, N), dtype)
    assert_products(jax.jit(lambda a: a)(a), dense)


@pytest.mark.parametrize("form", [*HOST, *TRACED])
@pytest.mark.long_beyond(2)
def test_every_form_has_the_same_factorization(form):
    """Of exact rank, so that the random columns, which are others on the host, do not matter."""
    dense = (thin(M) @ thin(N).T).astype(np.float32)
    f = nys.factorize({**HOST, **TRACED}[form](dense), rank=K)
    values = np.linalg.svd(dense)[1]
    np.testing.assert_allclose(f.singular_values, values[:K], atol=1e-5 * values[0])
    product = np.asarray((f.left * f.singular_values) @ f.right.T)
    np.testing.assert_allclose(product, dense, atol=1e-5 * values[0])
    assert int(f.status) == nys.lowrank.Status.EXACT


def test_factorize_refuses_products_that_disagree():
    a = HostOperator(lambda x: matrix() @ x, lambda y: -matrix().T @ y, (M, N), np.float32)
    with pytest.raises(ValueError, match="products disagree"):
        nys.factorize(a, rank=2)


def test_duplicate_entries_are_summed():
    entries = np.array([1.0, 2.0, 4.0], np.float32)
    place = (np.array([0, 0, 2]), np.array([1, 1, 0]))
    dense = np.zeros((3, 2), np.float32)
    np.add.at(dense, place, entries)
    bcoo = sparse.BCOO((jnp.asarray(entries), jnp.stack(place, axis=1)), shape=(3, 2))
    for a in (scipy.sparse.coo_array((entries, place), shape=(3, 2)), bcoo):
        np.testing.assert_array_equal(as_input("A", a).times(np.eye(2, dtype=np.float32)), dense)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_keeps_its_dtype(dtype):
    assert as_input("A", jnp.ones((M, N), dtype)).dtype == dtype


def test_double_precision_is_single_where_x64_is_off():
    assert as_input("A", scipy.sparse.eye_array(3, dtype=np.float64)).dtype == np.float32


def test_entries_under_jit_stay_with_jax():
    bcoo = sparse.BCOO.fromdense(jnp.asarray(matrix()))

    @jax.jit
    def image(a, x):
        a = as_input("A", a)
        assert isinstance(a, sparse.BCOO)
        return a @ x

    np.testing.assert_allclose(image(bcoo, thin(N)), matrix() @ thin(N), rtol=1e-5, atol=1e-5)


def test_a_matrix_of_the_host_is_taken_as_it_is():
    class Diagonal:
        shape, dtype = (4, 4), np.dtype(np.float32)

        def times(self, x):
            return 2 * x

        adjoint_times = times

    a = Diagonal()
    assert as_input("A", a) is a


def test_lineax_operators_alike_share_a_compilation():
    traces = []

    @jax.jit
    def image(a, x):
        traces.append(a)
        return a @ x

    for scale in (1, 2):
        a = as_input("A", lineax_operator(scale * matrix()))
        np.testing.assert_allclose(
            image(a, jnp.asarray(thin(N))), scale * matrix() @ thin(N), rtol=1e-5
        )
    assert len(traces) == 1


def test_large_sparse_products_need_no_dense_copy():
    """A dense copy would take 400 TB."""
    n = 10_000_000
    a = as_input("A", scipy.sparse.eye_array(n, dtype=np.float32, format="csr"))
    x = np.ones((n, 1), np.float32)
    assert (a.times(x) == x).all()
    assert (a.adjoint_times(x) == x).all()


# Bad input.


def operator(times=None, adjoint_times=None, dense=None, dtype=np.float32):
    dense = matrix(dtype) if dense is None else dense
    return HostOperator(
        times or (lambda x: dense @ x),
        adjoint_times or (lambda y: dense.conj().T @ y),
        shape=(M, N),
        dtype=dtype,
    )


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


UNDER_JIT = {
    "functions": lambda: operator(),
    "scipy operator": lambda: aslinearoperator(matrix()),
    "blocks": lambda: RowBlocks(matrix()),
}


@pytest.mark.parametrize("options", [{"rank": 2}, {"tol": 0.1}])
@pytest.mark.parametrize("form", UNDER_JIT)
def test_products_of_numpy_are_refused_under_jit(form, options):
    a = UNDER_JIT[form]()
    with pytest.raises(ValueError, match=r"A, a .*, is multiplied by NumPy and is traced by JAX"):
        jax.jit(lambda scale: scale * nys.factorize(a, **options).left)(1.0)


def test_a_constant_sparse_matrix_is_factorized_under_jit():
    a = scipy.sparse.csr_array(matrix())
    values = jax.jit(lambda scale: scale * nys.factorize(a, rank=2).singular_values)(2.0)
    expected = np.linalg.svd(matrix(), compute_uv=False)[:2]
    np.testing.assert_allclose(values, 2 * expected, rtol=1e-3)


@pytest.mark.parametrize("make", [operator, lambda: RowBlocks(matrix())])
@pytest.mark.parametrize("x", [thin(M), thin(N, np.complex64)])
def test_arguments_that_do_not_fit(make, x):
    with pytest.raises(ValueError, match=r"the argument of .*A x has shape .*; expected \(5, k\)"):
        make().times(x)


def test_negative_indices_are_refused():
    a = sparse.BCOO((jnp.ones(2), jnp.array([[-1, 0], [0, 1]])), shape=(M, N))
    with pytest.raises(ValueError, match="A has negative indices"):
        as_input("A", a)


@pytest.mark.parametrize(
    ("a", "message"),
    [
        (np.ones((M, N), int), "A has dtype int32; expected .*convert it with .astype"),
        (scipy.sparse.eye_array(3, dtype=int), "A has dtype int64; expected .*with .astype"),
        (aslinearoperator(np.ones((M, N), int)), "A has dtype int64; expected .*with .astype"),
        (scipy.sparse.diags_array([np.float32(np.nan)]), "A has NaN or Inf entries"),
        (np.ones(3, np.float32), r"A has shape \(3,\); expected a matrix"),
        ((np.sin, np.cos), "A is a tuple; expected a dense array"),
        ("text", "A is a str; expected a dense array"),
    ],
)
def test_what_is_no_matrix(a, message):
    with pytest.raises(ValueError, match=message):
        as_input("A", a)


def test_lineax_operators_of_trees_are_refused():
    lineax = pytest.importorskip("lineax")

    tree = {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}
    with pytest.raises(ValueError, match="expected one from vectors to vectors"):
        as_input("A", lineax.FunctionLinearOperator(lambda x: x, tree))


def test_reading_a_matrix_imports_no_optional_package():
    code = (
        "import sys, nyscaled.lowrank.host as h, numpy as np;"
        "h.as_input('A', np.eye(3, dtype='f'));"
        "print({'lineax', 'pylops', 'scipy.io', 'h5py', 'zarr', 'tqdm'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "set()", result.stderr


@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
@pytest.mark.parametrize("empty", ["none", "first half", "all but one"])
def test_sparse_matrices_are_stored_once_and_multiplied_in_blocks(dtype, empty):
    m, n, columns = 700, 500, 4
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((m, n)).astype(dtype)
    dense *= 1 + 1j if dtype == np.complex64 else 1
    rows = {"none": slice(0), "first half": slice(m // 2), "all but one": slice(1, None)}[empty]
    dense[rows] = 0
    stored = scipy.sparse.csr_array(dense)
    a = SparseMatrix(stored)
    assert len(a.blocks) == {"none": 4, "first half": 1, "all but one": 1}[empty]
    for block in a.blocks:
        assert np.shares_memory(block.matrix.data, stored.data) or not block.matrix.nnz
        assert np.shares_memory(block.transpose.data, stored.data) or not block.matrix.nnz
    assert a.blocks[-1].rows.stop == m
    x, y = (rng.standard_normal((k, columns)).astype(np.float32) for k in (n, m))
    np.testing.assert_allclose(a.times(x), dense @ x, atol=1e-3)
    np.testing.assert_allclose(a.adjoint_times(y), dense.conj().T @ y, atol=1e-3)
