"""matrices: what A may be, at every door; operators and their dtypes; the product with Aᵀ."""

import functools
import inspect
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pandas
import pytest
import scipy.sparse
import scipy.sparse.linalg
from cases import normal
from flax import nnx
from jax.experimental import sparse
from jax.tree_util import Partial

import nyscaled as nys
from nyscaled._pytree import pytree_dataclass
from nyscaled.linalg import leading_factors
from nyscaled.matrices import as_matrix, transpose_times

M, N, R = 12, 8, 2
KEY = jax.random.key(0)


def made(shape):
    """A float32 array with rows and entries that are zero; symmetric if square."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(shape[0], 3)) @ rng.normal(size=(3, shape[1]))
    a[3] = 0
    a[:, 5] = 0
    if shape[0] == shape[1]:
        a = a @ a.T
    return a.astype(np.float32)


A = made((M, N))


@pytree_dataclass
class Diagonal:
    """An operator of somebody else: a pytree of JAX arrays with shape, dtype, T and @."""

    d: object

    shape = (M, M)
    dtype = jnp.dtype("float32")
    T = property(lambda self: self)

    def __matmul__(self, x):
        return self.d[:, None] * x


class NumpyBacked:
    """What has shape, dtype, T and @, and computes in NumPy."""

    def __init__(self, a):
        self.a, self.shape, self.dtype = a, a.shape, a.dtype

    @property
    def T(self):
        return NumpyBacked(self.a.T)

    def __matmul__(self, x):
        return self.a @ np.asarray(x)


class Lineax:
    """As lineax's operators: products by `mv`, and no shape."""

    T = property(lambda self: self)

    def __init__(self, a):
        self.matrix = a

    def mv(self, x):
        return self.matrix @ x


def doubled(a):
    """COO with every entry in two halves, out of order."""
    entries = scipy.sparse.coo_array(a)
    rows, columns = (np.tile(i[::-1], 2).astype(np.int64) for i in entries.coords)
    return scipy.sparse.coo_array((np.tile(entries.data[::-1] / 2, 2), (rows, columns)), a.shape)


def unsorted(a):
    """CSR with explicit zeros, and columns that fall."""
    m, n = a.shape
    columns = np.tile(np.arange(n)[::-1], m)
    return scipy.sparse.csr_array((a[:, ::-1].ravel(), columns, n * np.arange(m + 1)), a.shape)


def operator(a):
    a = jnp.asarray(a)
    return nys.linalg.Operator(Partial(jnp.matmul, a), Partial(transpose_times, a), a.shape)


FORMATS = ("bsr", "coo", "csc", "csr", "dia", "dok", "lil")
DENSE = {
    "jax": jnp.asarray,
    "numpy": np.asarray,
    "numpy_float64": np.float64,
    "fortran": np.asfortranarray,
    "big-endian": lambda a: a.astype(">f4"),
    "strided": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
    "matrix": np.matrix,
    "rows": lambda a: a.tolist(),
    "DataFrame": pandas.DataFrame,
    "nnx.Param": lambda a: nnx.Param(jnp.asarray(a)),
}
SPARSE = {
    **{f"{f}_array": getattr(scipy.sparse, f"{f}_array") for f in FORMATS},
    **{f"{f}_matrix": getattr(scipy.sparse, f"{f}_matrix") for f in FORMATS},
    "float64": lambda a: scipy.sparse.csr_array(a.astype(np.float64)),
    "doubled": doubled,
    "unsorted": unsorted,
    "BCOO": sparse.BCOO.fromdense,
    "BCOO_batch": lambda a: sparse.BCOO.fromdense(a, n_batch=1),
    "BCOO_dense": lambda a: sparse.BCOO.fromdense(a, n_dense=1),
    "BCOO_padded": lambda a: sparse.BCOO.fromdense(a, nse=a.size),
    "BCSR": sparse.BCSR.fromdense,
    "COO": sparse.COO.fromdense,
    "CSR": sparse.CSR.fromdense,
    "CSC": sparse.CSC.fromdense,
}
TAKEN = {**DENSE, **SPARSE, "Operator": operator}
REFUSED = {
    "LinearOperator": (scipy.sparse.linalg.aslinearoperator, "A is a .*LinearOperator"),
    "NumPy behind @": (NumpyBacked, "A is a NumpyBacked"),
    "lineax": (Lineax, "A is a Lineax; expected a dense array"),
    "masked": (lambda a: np.ma.masked_array(a, a > 1), "A is a MaskedArray"),
    "masked nowhere": (np.ma.masked_array, "A is a MaskedArray"),
    "object": (lambda a: a.astype(object), "A is a ndarray of dtype object"),
    "text": (lambda a: a.astype(str), "A is a ndarray of dtype <U"),
    "longdouble": (np.longdouble, "A is a ndarray of dtype float128|A has dtype float64"),
    "ragged": (lambda a: [[1.0, 2.0], [3.0]], "A is a list"),
    "DataFrame of text": (lambda a: pandas.DataFrame({"x": ["y"]}), "A is a DataFrame"),
    "integers": (lambda a: a.astype(np.int64), "A has dtype int"),
    "booleans": (lambda a: a > 0, "A has dtype bool"),
    "complex": (lambda a: a.astype(np.complex64), "A has dtype complex64"),
    "float16": (np.float16, "A has dtype float16"),
    "rows of integers": (lambda a: [[1, 2], [2, 5]], "A has dtype int32"),
    "vector": (lambda a: a[0], r"A has shape \(\d+,\)"),
    "stack": (lambda a: a[None], r"A has shape \(1, 12, \d+\)"),
    "sparse vector": (lambda a: scipy.sparse.coo_array(a[0]), r"A has shape \(\d+,\)"),
    "sparse integers": (lambda a: scipy.sparse.csr_array(a.astype(int)), "A has dtype int64"),
    "sparse booleans": (lambda a: scipy.sparse.lil_matrix(a > 0), "A has dtype bool"),
    "sparse complex": (lambda a: scipy.sparse.dok_array(a * 1j), "A has dtype complex"),
    "sparse longdouble": (lambda a: scipy.sparse.csr_array(np.longdouble(a)), "A has dtype float"),
    "BCSR of integers": (lambda a: sparse.BCSR.fromdense(a.astype(int)), "A has dtype int32"),
    "BCSR in batches": (
        lambda a: sparse.BCSR.fromdense(a[None], n_batch=1),
        r"A has shape \(1, 12, \d+\)",
    ),
    "too wide": (lambda a: scipy.sparse.csr_array((2, 2**31 + 5), dtype="f"), "A has shape"),
}


@pytest.mark.long_beyond(6)
@pytest.mark.parametrize("kind", TAKEN)
def test_every_kind_of_matrix_has_the_products_of_the_dense_one(kind):
    given = TAKEN[kind](A)
    a = as_matrix("A", given)
    if kind in SPARSE:
        assert isinstance(a, sparse.BCOO)
        assert a.indices.dtype == jnp.int32
    assert isinstance(a, jax.Array) == (kind in DENSE)
    assert (a.shape, a.dtype) == (A.shape, jnp.float32)
    x, y = normal(1, (N, R)), normal(2, (M, R))
    times = jax.jit(lambda a, x, y: (a @ x, transpose_times(a, y)))
    chex.assert_trees_all_close(times(a, x, y), (A @ x, A.T @ y), rtol=1e-5, atol=1e-5)
    if kind == "doubled":
        assert a.nse == np.count_nonzero(A)
        chex.assert_trees_all_equal(given.nnz, 2 * a.nse)  # and what was given is as it was


@pytest.mark.parametrize("kind", REFUSED)
def test_every_other_kind_is_refused_by_name(kind):
    make, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        as_matrix("A", make(A))


@pytest.mark.parametrize("kind", ["CSR", "csr_array"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_values_of_sparse_matrices_are_checked(kind, bad):
    a = A.copy()
    a[0, 0] = 1.0
    given = SPARSE[kind](np.where(a == 1.0, np.float32(bad), 0.0 * a if bad == 0 else a))
    with pytest.raises(ValueError, match="A has NaN or Inf" if bad else "A is the zero matrix"):
        nys.problems.Asymmetric(given)


def test_operators_of_others_are_taken_if_their_products_can_be_compiled():
    a = Diagonal(jnp.arange(1.0, M + 1))
    assert as_matrix("A", a) is a
    problem = nys.problems.Symmetric(a)
    start = nys.initializers.nystrom(KEY, a, M)
    x = nys.solvers.run(nys.solvers.scaled_step(problem), start, 12).params
    chex.assert_trees_all_close(x @ x.T, jnp.diag(a.d), atol=1e-4)
    for bad in (Diagonal(jnp.ones(M + 1)), Diagonal(1j * jnp.ones(M)), Diagonal("d")):
        object.__setattr__(bad, "dtype", jnp.dtype("float32"))
        with pytest.raises(ValueError, match=r"A is a Diagonal, and its product .*; expected"):
            nys.problems.Symmetric(bad)


# --- Doors ---------------------------------------------------------------------------------------

PSD = made((M, M))
X, Y = normal(3, (M, R)), normal(4, (M, R))
PAIR = nys.Factors(X, Y)


def gram(x):
    """The same whatever the signs of the columns."""
    return jnp.matmul(x, x.T, precision="highest")


def solved(problem, start):
    step = nys.solvers.scaled_step(problem, 0.5)
    return nys.solvers.run(step, start, 2, record=problem.loss)[:2]


start = nys.initializers
# By the name of the parameter: `a` takes every matrix, others dense ones alone.
MATRICES = {
    "Symmetric": lambda a: solved(nys.problems.Symmetric(a), X),
    "Asymmetric": lambda a: solved(nys.problems.Asymmetric(a), PAIR),
    "nystrom": lambda a: start.nystrom(KEY, a, R),
    "nystrom_factors": lambda a: start.nystrom_factors(KEY, a, R),
    "nystrom_approximation": lambda a: gram(start.nystrom_approximation(KEY, a, R)),
    "perturbed": lambda a: start.perturbed(KEY, a, R),
    "rescaled": lambda a: start.rescaled(X, a),
    "altgd": lambda a: start.altgd(KEY, a, R, norm=2.0),
    "spectral_norm": nys.linalg.spectral_norm,
    "squared_residual": lambda a: nys.linalg.squared_residual(a, X, Y),
    "residual": lambda a: nys.linalg.residual(a, X, Y),
    "probed_norm": nys.linalg.probed_norm,
    "leading_factors": lambda a: gram(leading_factors(KEY, a, 3).left),
    "gradient": lambda a: nys.problems.Asymmetric(a).gradient(PAIR),
    "spectral": lambda a: gram(start.spectral(nys.problems.Symmetric(a), 3)),
}
DENSE_ONLY = {
    "RobustPCA": lambda a: nys.problems.RobustPCA(a, 0.1).gradient(PAIR),
    "threshold": lambda a: nys.problems.robust.threshold(a, 0.1),
    "Sensing": lambda a: nys.problems.Sensing(a, jnp.ones(4)).gradient(jnp.ones((3, 1))),
    "RankOne": lambda a: nys.problems.phase.RankOne(a).vectors,
    "gram_solve": lambda a: nys.linalg.gram_solve(X, a),
    **{name: getattr(nys.linalg, name) for name in ("dual", "orthonormalize", "compress", "pinv")},
    "factor": lambda a: nys.linalg.factor(a).z,
    "check": nys.problems.Symmetric(PSD).check,
    "check of a pair": lambda a: nys.problems.Asymmetric(PSD).check(nys.Factors(a, Y)),
    "nesterov_parameters": nys.solvers.nesterov_parameters,
    **{
        name: functools.partial(getattr(nys.optimality, name), basis=Y, spectrum=jnp.ones(R))
        for name in ("residual_in_basis", "weak_gram", "weak_optimality")
    },
    "residual_space": lambda a: nys.optimality.residual_space(a, Y),
    "principal_angles": lambda a: nys.optimality.principal_angles(a, Y),
    "distance": lambda a: nys.optimality.distance(a, Y),
    "generalized_weak_optimality": lambda a: nys.optimality.generalized_weak_optimality(
        nys.Factors(a, Y), X, Y, jnp.ones(R)
    ),
    "gradient": nys.problems.Symmetric(PSD).gradient,
    "gradient of a pair": lambda a: nys.problems.Asymmetric(PSD).gradient(nys.Factors(a, Y)),
    "gradient of robust PCA": lambda a: nys.problems.RobustPCA(PSD, 0.1).gradient(
        nys.Factors(a, Y)
    ),
    "gradient of sensing": nys.problems.Sensing(PSD[None], jnp.ones(1)).gradient,
    "start of a run": lambda a: solved(nys.problems.Symmetric(PSD), a),
}


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize("door", MATRICES)
def test_every_function_that_takes_a_matrix_takes_every_kind(door):
    fn = MATRICES[door]
    expected = fn(jnp.asarray(PSD))
    for kind in ("numpy", "csr_array", "BCSR", "Operator"):
        chex.assert_trees_all_close(fn(TAKEN[kind](PSD)), expected, rtol=1e-3, atol=1e-3)
    for kind in ("LinearOperator", "sparse integers", "complex", "vector"):
        make, message = REFUSED[kind]
        with pytest.raises(ValueError, match=message):
            fn(make(PSD))


def dense(door):
    """An array that a function of DENSE_ONLY takes."""
    by_door = {"Sensing": normal(5, (4, 3, 3)), "RobustPCA": PSD, "threshold": PSD}
    return np.asarray(by_door.get(door, X))


@pytest.mark.long_beyond(3)
@pytest.mark.parametrize("door", DENSE_ONLY)
def test_functions_of_dense_arrays_refuse_others_by_name(door):
    fn = DENSE_ONLY[door]
    a = dense(door)
    chex.assert_trees_all_close(fn(a), fn(jnp.asarray(a)))
    if a.ndim == 2:
        chex.assert_trees_all_close(fn(pandas.DataFrame(a)), fn(a))
    flat = a.reshape(len(a), -1)
    for given in (scipy.sparse.csr_array(flat), sparse.BCOO.fromdense(flat), Lineax(flat)):
        with pytest.raises(ValueError, match=f"is a {type(given).__name__}; expected a dense"):
            fn(given)


def test_no_function_that_takes_a_matrix_is_left_out():
    rooms = [
        nys.initializers,
        nys.linalg,
        nys.optimality,
        nys.solvers,
        nys.problems,
    ]
    rooms += [m for m in vars(nys.problems).values() if inspect.ismodule(m)]
    doors = {
        name
        for room in rooms
        for name, fn in vars(room).items()
        if callable(fn) and not name.startswith("_")
        if getattr(fn, "__module__", "").startswith("nyscaled")
        if {"a", "map", "observed", "matrices", "vectors"} & set(inspect.signature(fn).parameters)
    }
    assert "squared_residual" in doors
    covered = {
        *MATRICES,
        *DENSE_ONLY,
        "as_array",
        "as_matrix",
        "symmetric_part",
        "transpose_times",
        "Matrices",
        "OneBit",
        "measured",
    }
    assert doors - covered == set()


# --- Operators -----------------------------------------------------------------------------------


def test_operators_take_their_dtype_from_their_functions_and_refuse_another():
    a = jnp.asarray(A)
    assert operator(A).dtype == jnp.float32
    assert nys.linalg.Operator(lambda x: 2 * x, lambda x: 2 * x, (3, 3)).dtype == jnp.float32
    narrow = a.astype(jnp.bfloat16)
    assert nys.linalg.Operator(Partial(jnp.matmul, narrow), lambda y: a.T @ y, (M, N)).dtype == "f"
    with pytest.raises(ValueError, match=r"matmat of .* is \(12, 2\) complex64; expected"):
        nys.linalg.Operator(lambda x: 1j * a @ x, lambda y: a.T @ y, (M, N), dtype="float32")


BAD = {
    "shape": (lambda x: A @ x, lambda y: A @ y, (M, N), r"rmatmat of .*\(12, 2\).* cannot be"),
    "turned": (
        lambda x: A @ x,
        lambda y: y,
        (M, N),
        r"rmatmat .* is \(12, 2\) .*; expected \(8, 2",
    ),
    "numpy": (
        lambda x: A @ np.asarray(x),
        lambda y: A.T @ y,
        (M, N),
        "matmat .* cannot be compiled",
    ),
    "vectors": (lambda x: jnp.dot(x, A), lambda y: A.T @ y, (M, N), "matmat .* cannot be compiled"),
    "pair": (lambda x: (A @ x, x), lambda y: A.T @ y, (M, N), "matmat .* is a tuple; expected"),
    "array": (A, A.T, (M, N), "matmat is a ndarray; expected a function of JAX"),
    "sides": (lambda x: x, lambda y: y, (M,), r"shape is \(12,\); expected \(m, n\)"),
    "empty": (lambda x: x, lambda y: y, (0, 0), r"shape is \(0, 0\); expected \(m, n\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_operators_whose_functions_do_not_fit_are_refused_by_the_constructor(name):
    *args, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        nys.linalg.Operator(*args)


def test_operators_may_be_made_and_transposed_inside_of_jit():
    @jax.jit
    def twice(a, x):
        op = nys.linalg.Operator(lambda x: a @ x, lambda y: a.T @ y, a.shape)
        return op.T @ (op.T.T @ x)

    x = normal(1, (N, R))
    chex.assert_trees_all_close(twice(jnp.asarray(A), x), A.T @ (A @ x), rtol=1e-5, atol=1e-5)


# --- Measurement maps, and gradients -------------------------------------------------------------


@pytree_dataclass
class Halves:
    """𝒜(M) = diag(M)/2, a measurement map of somebody else."""

    lengths: object

    shape = (M, M)
    count = M
    dtype = jnp.dtype("float32")

    def forward(self, left, right):
        return jnp.sum(left * right, axis=1) / 2 + 0 * self.lengths

    def adjoint(self, weights):
        return jnp.diag(weights / 2)


def test_measurement_maps_of_others_are_traced_once():
    b = jnp.ones(M)
    gradient = nys.problems.Sensing(Halves(b), b).gradient(PAIR)
    w = jnp.sum(X * Y, axis=1) / 2 - b
    chex.assert_trees_all_close(gradient.left, w[:, None] * Y / 2, atol=1e-5)
    with pytest.raises(ValueError, match=r"Halves.forward is \(5, 12\) float32; expected"):
        nys.problems.Sensing(Halves(jnp.ones((5, 1))), b)


def test_gradients_of_another_shape_are_refused_before_they_broadcast():
    with pytest.raises(ValueError, match=r"gradient has shape \(12, 1\); expected \(12, 2\)"):
        start.nystrom_from_gradient(KEY, lambda x: x[:, :1], M, R)
    with pytest.raises(ValueError, match="gradient is a csr_array; expected a dense array"):
        start.nystrom_from_gradient(KEY, lambda x: scipy.sparse.csr_array(X), M, R)
    with pytest.raises(ValueError, match=r"gradient is a ArrayImpl; expected nyscaled\.Factors"):
        start.nystrom_factors_from_gradient(KEY, lambda f: f.left, (M, M), R)


@pytest.mark.parametrize("fn", [lambda p: start.spectral(p, R), nys.solvers.scaled_step])
def test_a_matrix_in_the_place_of_its_problem_is_refused(fn):
    for given in (PSD, scipy.sparse.csr_array(PSD)):
        with pytest.raises((ValueError, TypeError), match="problem"):
            fn(given)


# --- The product with the transpose --------------------------------------------------------------


ROWS, COLUMNS = 40, 30
WIDE = normal(5, (ROWS, COLUMNS))
PAIR_OF_WIDE = nys.Factors(normal(6, (ROWS, R)), normal(7, (COLUMNS, R)))
PRODUCTS = {
    "transpose_times": lambda a: transpose_times(a, PAIR_OF_WIDE.left),
    "scaled_step": lambda a: nys.solvers.run(
        nys.solvers.scaled_step(nys.problems.Asymmetric(a)), PAIR_OF_WIDE, 2
    ),
    "gradient": lambda a: nys.problems.Asymmetric(a).gradient(PAIR_OF_WIDE),
    "sensing": lambda a: nys.problems.Sensing(a[None], jnp.ones(1)).gradient(PAIR_OF_WIDE),
    "robust": lambda a: nys.problems.RobustPCA(a, 0.1).gradient(PAIR_OF_WIDE),
    "phase": lambda a: nys.problems.Sensing(nys.problems.phase.RankOne(a), jnp.ones(ROWS)).gradient(
        PAIR_OF_WIDE.right
    ),
    "spectral_norm": nys.linalg.spectral_norm,
    "leading_factors": lambda a: leading_factors(KEY, a, R),
    **{
        f"{name} {options}": lambda a, name=name, options=options: nys.lora.KERNEL_INITS[name](
            KEY, a, R, 1.0, **options
        )
        for name, options in (("nora", {"side": "output"}), ("pissa", {"niter": 2}), ("olora", {}))
    },
}


def transposed(fn):
    """The products of XLA's program that contract the rows of A from the left and copy it."""
    text = jax.jit(fn).lower(WIDE).compile().as_text()
    assert " dot(" in text
    # With x from the left the result is (k, n), or this in the order of columns.
    result = re.escape(f"= f32[{COLUMNS},") + r"\d+" + re.escape("]{1,0} dot(")
    contracted = re.escape("lhs_contracting_dims={0}")
    products = re.findall(rf"{result}(%[\w.-]+), .*{contracted}", text)
    return [a for a in products if f"{a} = f32[{ROWS},{COLUMNS}]" in text]


@pytest.mark.long_beyond(2)
@pytest.mark.parametrize("name", PRODUCTS)
def test_no_program_transposes_a_dense_matrix(name):
    assert not transposed(PRODUCTS[name])


def test_a_transpose_is_seen_in_either_form():
    x = PAIR_OF_WIDE.left
    assert transposed(lambda a: a.T @ x)
    assert transposed(lambda a: jax.lax.dot_general(x, a, (((0,), (0,)), ((), ()))).T)


def test_products_with_the_transpose_are_batched_and_have_derivatives():
    x = PAIR_OF_WIDE.left
    a = WIDE
    batch = jax.vmap(transpose_times)(jnp.stack([a, 2 * a]), jnp.stack([x, x]))
    chex.assert_trees_all_close(batch[1], 2 * a.T @ x, rtol=1e-5, atol=1e-5)
    found = jax.grad(lambda a, x: jnp.sum(transpose_times(a, x) ** 2), argnums=(0, 1))(a, x)
    image = a.T @ x
    chex.assert_trees_all_close(found, (2 * x @ image.T, 2 * a @ image), rtol=1e-4, atol=1e-4)
