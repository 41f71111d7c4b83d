"""nystrom_preconditioner: condition number, steps of conjugate gradients, forms."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import KEY, normal

import nyscaled as nys
from nyscaled.linalg import KernelMatrix, kernels
from nyscaled.lowrank import nystrom_preconditioner

SIZE, MU = 200, 1e-3
A, _ = nys.spectra.psd(KEY, SIZE, 0.8 ** np.arange(SIZE))
B = normal(1, (SIZE,))


def shifted(x):
    return jnp.matmul(A, x, precision="highest") + MU * x


def condition(rank):
    """The condition number after preconditioning, and its bound, in float64."""
    psd = nys.nystrom(A, rank, passes=1)
    inverse = np.asarray(nystrom_preconditioner(psd, MU) @ jnp.eye(SIZE), np.float64)
    matrix = np.asarray(A, np.float64)
    values, turn = np.linalg.eigh((inverse + inverse.T) / 2)
    root = turn * np.sqrt(values)
    levels = np.linalg.eigvalsh(root.T @ (matrix + MU * np.eye(SIZE)) @ root)
    factor = np.asarray(psd.factor, np.float64)
    error = np.linalg.norm(matrix - factor @ factor.T, 2)
    return levels[-1] / levels[0], (float(psd.eigenvalues[-1]) + MU + error) / MU


@pytest.mark.parametrize("rank", [5, 20, 50])
@pytest.mark.long_beyond(1)
def test_the_condition_number_is_within_its_bound(rank):
    measured, bound = condition(rank)
    assert measured <= 1.01 * bound


def steps_allowed(condition_number, tolerance):
    """Steps that bring the error in the norm of A down to the tolerance, by Chebyshev's bound."""
    return math.ceil(math.sqrt(condition_number) / 2 * math.log(2 / tolerance))


def error_after(steps, preconditioner):
    x, _ = jax.scipy.sparse.linalg.cg(shifted, B, tol=0, maxiter=steps, M=preconditioner)
    exact = np.linalg.solve(np.asarray(A, np.float64) + MU * np.eye(SIZE), np.asarray(B))
    difference = np.asarray(x, np.float64) - exact
    energy = lambda v: math.sqrt(v @ (np.asarray(A, np.float64) @ v + MU * v))  # noqa: E731
    return energy(difference) / energy(exact)


@pytest.mark.long
def test_steps_fall_to_what_the_condition_number_allows():
    rank = 50  # about twice the effective dimension, 31
    measured, _ = condition(rank)
    assert measured < 4
    steps = steps_allowed(measured, 1e-3)
    assert steps < 10
    preconditioner = nystrom_preconditioner(nys.nystrom(A, rank, passes=1), MU)
    assert error_after(steps, preconditioner) < 1e-3
    # The controls: no preconditioner, and one of too small a rank.
    assert error_after(steps, None) > 1e-2
    small = nystrom_preconditioner(nys.nystrom(A, 5, passes=1), MU)
    assert error_after(steps, small) > 1e-2


@pytest.mark.long
def test_it_solves_with_a_kernel_matrix():
    a = KernelMatrix(kernels.gaussian(1.0), normal(2, (SIZE, 2)))
    inverse = nystrom_preconditioner(nys.nystrom(a, 60), 1e-3)

    @jax.jit
    def solved(a, inverse, b):
        return jax.scipy.sparse.linalg.cg(
            lambda x: a @ x + 1e-3 * x, b, tol=1e-4, maxiter=20, M=inverse
        )[0]

    x = solved(a, inverse, B)
    assert jnp.linalg.norm(a @ x + 1e-3 * x - B) < 1e-3 * jnp.linalg.norm(B)


@pytest.mark.long
def test_it_is_a_symmetric_matrix_of_vectors_and_columns():
    inverse = nystrom_preconditioner(nys.nystrom(A, 20), MU)
    whole = inverse @ jnp.eye(SIZE)
    chex.assert_trees_all_close(whole, whole.T, atol=1e-6)
    chex.assert_trees_all_close(inverse(B), whole @ B, atol=1e-5)
    chex.assert_trees_all_close(inverse @ B[:, None], inverse(B)[:, None], atol=1e-6)
    assert nys.linalg.spectral_norm(inverse) < 1.01
    chex.assert_trees_all_close(jax.tree.map(lambda x: x, inverse)(B), inverse(B))


@pytest.mark.long
def test_a_hermitian_matrix_is_multiplied_by_adjoints():
    phases = jnp.exp(1j * jnp.linspace(0, 6, SIZE))
    psd = nys.nystrom(phases[:, None] * A * phases.conj(), 20)
    inverse, real = nystrom_preconditioner(psd, MU), nystrom_preconditioner(nys.nystrom(A, 20), MU)
    expected = phases[:, None] * (real @ jnp.eye(SIZE)) * phases.conj()
    whole = inverse @ jnp.eye(SIZE)
    chex.assert_trees_all_close(whole, whole.conj().T, atol=1e-5)
    chex.assert_trees_all_close(whole, expected, atol=1e-2)
    chex.assert_trees_all_close(inverse.T @ jnp.eye(SIZE), whole.T, atol=1e-5)


@pytest.mark.long
def test_a_rank_that_the_matrix_does_not_have_is_no_fault():
    a, basis = nys.spectra.psd(KEY, SIZE, [2.0, 1.0])
    inverse = nystrom_preconditioner(nys.nystrom(a, 5), 0.5)
    expected = jnp.eye(SIZE) - basis @ jnp.diag(jnp.array([0.8, 2 / 3])) @ basis.T
    chex.assert_trees_all_close(inverse @ jnp.eye(SIZE), expected, atol=1e-5)


@pytest.mark.parametrize("mu", [0.0, -1.0, True])
def test_a_shift_that_is_not_positive_is_refused(mu):
    with pytest.raises(ValueError, match="mu is"):
        nystrom_preconditioner(nys.nystrom(A, 5), mu)


@pytest.mark.parametrize("shape", [(), (SIZE - 1,), (SIZE - 1, 2), (2, SIZE, 1)])
def test_products_that_do_not_fit_are_refused(shape):
    inverse = nystrom_preconditioner(nys.nystrom(A, 5), MU)
    with pytest.raises(ValueError, match=rf"x has shape .*; expected \({SIZE},\) or \({SIZE}, k\)"):
        inverse @ jnp.ones(shape)


@pytest.mark.long
def test_a_batch_of_approximations_is_refused():
    batch = jax.vmap(lambda a: nys.nystrom(a, 5))(jnp.stack([A, 2 * A]))
    with pytest.raises(
        ValueError, match=r"the approximation is a batch \(2, 200, 5\); expected one"
    ):
        nystrom_preconditioner(batch, MU)
