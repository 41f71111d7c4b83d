"""What `nys.factorize` takes: every form gives the products of the dense matrix."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from host_cases import K, M, N, assert_products, both, matrix, operator, thin
from jax.experimental import sparse
from jax.tree_util import Partial
from scipy.sparse.linalg import aslinearoperator

import nyscaled as nys
from nyscaled.lowrank import HostOperator, RowBlocks
from nyscaled.lowrank.host import HostMatrix, SparseMatrix, as_input
from nyscaled.lowrank.products import require_adjoint


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
    assert f.status is nys.lowrank.Status.EXACT


@pytest.mark.parametrize("options", [{"rank": 2}, {"tol": 0.1}])
@pytest.mark.parametrize(
    "make",
    [
        lambda times, wrong: HostOperator(times, wrong, (M, N), np.float32),
        lambda times, wrong: nys.linalg.Operator(times, wrong, (M, N)),
    ],
)
def test_factorize_refuses_products_that_disagree(make, options):
    a = make(lambda x: matrix() @ x, lambda y: -matrix().T @ y)
    with pytest.raises(ValueError, match="products disagree"):
        nys.factorize(a, **options)


def _times(a, x):
    return a @ x


def _transpose_times(a, y):
    return a.T @ y


def _half_times(a, x):
    return (a.astype(jnp.bfloat16) @ x.astype(jnp.bfloat16)).astype(jnp.float32)


def _half_transpose_times(a, y):
    return _half_times(a.T, y)


def _conjugate_times(a, y):
    return a.T @ y.conj()


@pytest.mark.parametrize(("m", "n"), [(1, 1), (40, 3), (3, 400)])
@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_sound_operators_are_not_refused(dtype, m, n):
    """Of any size, also where products lose digits, overflow, or are made in half precision."""
    rng = np.random.default_rng(0)
    single = np.zeros((m, n))
    single[-1, -1] = 1
    small, large = (size * rng.standard_normal((m, n)) for size in (1e-37, 1e36))
    for dense in (rng.random((m, n)), np.ones((m, n)), single, 0 * single, small, large):
        phases = np.exp(2j * np.pi * rng.random((m, n)))
        dense = jnp.asarray(dense * phases if dtype == np.complex64 else dense, dtype)
        products = [(_times, _transpose_times)]
        if dtype == np.float32:
            products.append((_half_times, _half_transpose_times))
        for pair in products:
            require_adjoint("A", nys.linalg.Operator(*_with(dense, *pair), (m, n), dtype))


def _with(dense, *functions):
    return [Partial(function, dense) for function in functions]


@pytest.mark.parametrize("size", [1e-28, 1, 1e30])
def test_wrong_adjoints_of_a_complex_operator_are_refused(size):
    dense = jnp.asarray(np.float32(size) * matrix(np.complex64))
    wrong = {
        "the adjoint in place of the transpose": (dense, dense.conj(), _transpose_times),
        "antilinear": (dense, dense, _conjugate_times),
        "larger": (dense, 1.2 * dense, _transpose_times),
        "zero": (dense, 0 * dense, _transpose_times),
        "times zero": (0 * dense, dense, _transpose_times),
    }
    for a, b, function in wrong.values():
        products = Partial(_times, a), Partial(function, b)
        with pytest.raises(ValueError, match="products disagree"):
            require_adjoint("A", nys.linalg.Operator(*products, (M, N), np.complex64))


@pytest.mark.long
def test_operators_that_are_traced_are_not_compared():
    dense = jnp.asarray(matrix())

    def norm(dense):
        a = nys.linalg.Operator(*_with(dense, _times, _transpose_times), (M, N))
        return jnp.sum(nys.factorize(a, rank=2).singular_values)

    expected = float(jnp.sum(nys.factorize(dense, rank=2).singular_values))
    for value in (
        jax.jit(norm)(dense),
        jax.jit(lambda: norm(dense))(),
        jax.vmap(norm)(dense[None])[0],
        jax.value_and_grad(norm)(dense)[0],
    ):
        assert float(value) == pytest.approx(expected, rel=1e-4)


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


KEYS = jax.random.split(jax.random.key(0), 2)


def of_keys(a, **options):
    """Singular values for a batch of keys."""
    return jax.vmap(lambda key: nys.factorize(a, key=key, **options).singular_values)(KEYS)


@pytest.mark.parametrize("form", [scipy.sparse.csr_array, sparse.BCOO.fromdense])
def test_a_sparse_matrix_is_factorized_for_a_batch_of_keys(form):
    a = form(matrix())
    expected = [nys.factorize(a, 2, key=key, passes=2).singular_values for key in KEYS]
    np.testing.assert_allclose(of_keys(a, rank=2, passes=2), expected, rtol=1e-4)


@pytest.mark.parametrize("options", [{"rank": 2}, {"tol": 0.1}])
@pytest.mark.parametrize("make", [operator, lambda: RowBlocks(matrix())])
def test_products_of_numpy_are_refused_for_a_batch_of_keys(make, options):
    with pytest.raises(ValueError, match="is multiplied by NumPy and is traced by JAX"):
        of_keys(make(), **options)


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
