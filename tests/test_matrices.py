"""matrices: what A may be, at every door; operators and their dtypes."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pandas
import pytest
import scipy.sparse
import scipy.sparse.linalg
from cases import normal
from jax.experimental import sparse
from jax.tree_util import Partial
from matrix_cases import (
    DENSE,
    KEY,
    REFUSED,
    SPARSE,
    TAKEN,
    A,
    Diagonal,
    Lineax,
    M,
    N,
    R,
    made,
    operator,
)

import nyscaled as nys
from nyscaled._pytree import pytree_dataclass
from nyscaled.linalg import leading_factors
from nyscaled.matrices import as_matrix, transpose_times


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
    "sides": (lambda x: x, lambda y: y, (M,), r"has shape \(12,\); expected a matrix"),
    "empty": (lambda x: x, lambda y: y, (0, 0), r"has shape \(0, 0\); expected a matrix"),
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

    @pytree_dataclass
    class Taller(Halves):
        def adjoint(self, weights):
            return jnp.ones((M + 1, M)) * weights

    with pytest.raises(ValueError, match=r"Taller.adjoint @ x is \(13, 2\) float32; expected"):
        nys.problems.Sensing(Taller(b), b)


def test_gradients_of_another_shape_are_refused_before_they_broadcast():
    with pytest.raises(ValueError, match=r"gradient has shape \(12, 1\); expected \(12, 2\)"):
        start.nystrom_from_gradient(KEY, lambda x: x[:, :1], M, R)
    with pytest.raises(ValueError, match="gradient is a csr_array; expected a dense array"):
        start.nystrom_from_gradient(KEY, lambda x: scipy.sparse.csr_array(X), M, R)
    with pytest.raises(ValueError, match=r"gradient is a ArrayImpl; expected nyscaled\.Factors"):
        start.nystrom_factors_from_gradient(KEY, lambda f: f.left, (M, M), R)


@pytest.mark.parametrize("fn", [lambda p: start.spectral(p, R), nys.solvers.scaled_step])
def test_a_matrix_in_the_place_of_its_problem_is_refused(fn, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of tests
    for given in (PSD, scipy.sparse.csr_array(PSD)):
        with pytest.raises(ValueError, match=r"problem is a \w+; expected"):
            fn(given)
