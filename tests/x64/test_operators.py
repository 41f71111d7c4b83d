"""float64: operators take their dtype from their functions, and sparse matrices keep theirs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from cases import M, N, R, exact_residual, psd, rectangular
from jax.tree_util import Partial

import nyscaled as nys
from nyscaled.linalg import Operator


def bound(a):
    return Operator(Partial(jnp.matmul, a), Partial(jnp.matmul, a.T), a.shape)


FORMS = {
    "operator": bound,
    "closures": lambda a: Operator(lambda x: a @ x, lambda y: a.T @ y, a.shape),
    "one of them float32": lambda a: Operator(
        lambda x: a @ x, lambda y: a.T.astype(y.dtype) @ y, a.shape
    ),
    "named": lambda a: Operator(lambda x: a @ x, lambda y: a.T @ y, a.shape, dtype="float64"),
    "csr": scipy.sparse.csr_array,
    "lil": scipy.sparse.lil_matrix,
}


@pytest.mark.parametrize("form", FORMS)
def test_runs_in_float64_end_at_its_rounding(form):
    a = psd()[0]
    problem = nys.problems.Symmetric(FORMS[form](a))
    assert problem.dtype == jnp.float64
    start = nys.initializers.nystrom(jax.random.key(1), problem.a, R)
    for step in (nys.solvers.scaled_step(problem), nys.solvers.scaled_newton_step(problem)):
        x = nys.solvers.run(step, start.astype(jnp.float32), 30).params
        assert exact_residual(x, a) < 1e-12
    b = rectangular()[0]
    problem = nys.problems.Asymmetric(FORMS[form](b))
    pair = nys.initializers.nystrom_factors(jax.random.key(1), problem.a, R)
    x, y = nys.solvers.run(nys.solvers.scaled_step(problem, 1.0), pair, 1).params
    assert exact_residual(x, b, y) < 1e-12


def test_functions_that_do_not_keep_the_dtype_are_refused():
    a = rectangular()[0]
    narrow = a.astype(jnp.float32)
    with pytest.raises(ValueError, match=r"matmat .* float32 is \(60, 2\) float64; expected"):
        Operator(lambda x: a @ x, lambda y: a.T @ y, a.shape, dtype=jnp.float32)

    def cast(x):
        return narrow @ x.astype(jnp.float32)

    with pytest.raises(ValueError, match=r"matmat .* float64 is \(60, 2\) float32; expected"):
        Operator(cast, lambda y: a.T @ y, (M, N))
    assert Operator(cast, lambda y: narrow.T @ y.astype(jnp.float32), (M, N)).dtype == jnp.float32


def test_indices_of_sparse_matrices_are_of_four_bytes():
    a = scipy.sparse.csr_array(np.eye(3))
    a.indices, a.indptr = a.indices.astype(np.int64), a.indptr.astype(np.int64)
    assert nys.problems.Symmetric(a).a.indices.dtype == jnp.int32
