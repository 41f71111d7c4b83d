"""float64: identities to rounding, floors that do not drift, and exact trajectories."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import M, N, R, conditioned, exact_residual, normal, psd, rectangular
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.tree_util import Partial

import nyscaled as nys

EPS = float(np.finfo(np.float64).eps)
seeds = st.integers(0, 2**31 - 1)


def ill_conditioned(kappa):
    return np.append(np.linspace(1.0, 0.82, 19), 1 / kappa)


# --- The fused step and the step by the gradient are the same iteration --------------------------

CASES = {  # name: symmetric, rank, learning rate, transform's arguments
    "(2) exact": (True, R, {}),
    "(2) under": (True, R - 2, {}),
    "(26)": (True, R + 3, {"pseudo_inverse": True}),
    "ScaledGD(λ)": (True, R, {"damping": 0.1}),
    "ScaledGD(λ) over": (True, R + 3, {"damping": 0.1}),
    "(6)": (False, R, {}),
    "(6) under": (False, R - 2, {}),
    "(35)": (False, R + 3, {"pseudo_inverse": True}),
    "(6) damped": (False, R, {"damping": 0.1}),
}


@pytest.mark.parametrize("learning_rate", [0.3, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_fused_step_agrees_with_the_gradient_step(name, learning_rate):
    symmetric, rank, arguments = CASES[name]
    # A start in range(A), as Nyström's, but of known condition: the gradient's error is eps·κ(X)².
    phi = conditioned(1, max(R, rank), min(R, rank), 5.0)
    phi = jnp.asarray(phi if rank <= R else phi.T)
    if symmetric:
        a, basis = psd()
        problem, start = nys.problems.Symmetric(a), basis @ phi
    else:
        a, left, _ = rectangular()
        problem = nys.problems.Asymmetric(a)
        start = nys.Factors(left @ phi, jnp.zeros((N, rank)))
    fused = nys.solvers.scaled_step(problem, learning_rate, arguments.get("damping", 0.0))
    tx = nys.scaled_gd(learning_rate, **arguments)
    by_gradient = nys.solvers.gradient_step(problem, tx)

    def history(step):
        return nys.solvers.run(step, start, 4, record=lambda x: x).history

    chex.assert_trees_all_close(history(fused), history(by_gradient), rtol=1e-9, atol=1e-11)


@settings(max_examples=5)
@given(seeds)
def test_exact_gram_step_maps_equivariantly_under_the_general_linear_group(seed):
    a, b = psd()[0], rectangular()[0]
    g = jnp.asarray(conditioned(seed, R, R, 10.0))
    inverse = jnp.linalg.inv(g)
    tx = nys.scale_by_gram()

    def update(gradient, params):
        return tx.update(gradient(params), tx.init(params), params)[0]

    # With the residual E held fixed, EX(XᵀX)⁻¹ at XG is EX(XᵀX)⁻¹G⁻ᵀ.
    x = normal(seed, (M, R))
    grads = nys.problems.Symmetric(a).gradient(x)
    found = tx.update(grads @ g, tx.init(x), x @ g)[0]
    expected = tx.update(grads, tx.init(x), x)[0] @ inverse.T
    chex.assert_trees_all_close(found, expected, rtol=1e-9, atol=1e-11)
    # X Yᵀ = (XG)(YG⁻ᵀ)ᵀ: the step of a pair sees the product only.
    problem = nys.problems.Asymmetric(b)
    pair = nys.Factors(x, normal(seed // 2, (N, R)))
    moved = nys.Factors(pair.left @ g, pair.right @ inverse.T)
    expected = update(problem.gradient, pair)
    expected = nys.Factors(expected.left @ g, expected.right @ inverse.T)
    chex.assert_trees_all_close(update(problem.gradient, moved), expected, rtol=1e-9, atol=1e-11)


# --- Floors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kappa", [1e2, 1e6, 1e9])
def test_over_parametrized_run_does_not_drift(kappa):
    a, _ = psd(1, ill_conditioned(kappa), m=100)
    x = nys.initializers.nystrom(jax.random.key(2), a, 60)
    step = nys.solvers.scaled_step(nys.problems.Symmetric(a), 0.5)
    x = nys.solvers.run(step, x, 10_000).params
    assert exact_residual(x, a) <= 1e-13


@pytest.mark.parametrize(("kappa", "num_steps"), [(1e2, 1000), (1e6, 1000), (1e9, 10_000)])
def test_over_parametrized_asymmetric_run_does_not_drift(kappa, num_steps):
    a, _, _ = nys.spectra.rectangular(jax.random.key(1), 100, 80, ill_conditioned(kappa))
    start = nys.initializers.nystrom_factors(jax.random.key(2), a, 60)
    step = nys.solvers.scaled_step(nys.problems.Asymmetric(a), 0.5)
    x, y = nys.solvers.run(step, start, num_steps).params
    assert exact_residual(x, a, y) <= 1e-13


def test_nystrom_solves_the_papers_matrix_by_iteration_16():
    a, _ = nys.spectra.paper("fig1ab", jax.random.key(0))
    assert a.shape == (1000, 1000)
    x0 = nys.initializers.nystrom(jax.random.key(1), a, 20, scale=0.1)
    step = nys.solvers.scaled_step(nys.problems.Symmetric(a), 0.5)
    assert exact_residual(nys.solvers.run(step, x0, 16).params, a) <= 1e-12


@pytest.mark.parametrize("kappa", [1e2, 1e5, 1e8, 1e11, 1e13, 1e15])
def test_dual_is_as_accurate_as_householder_qr(kappa):
    x = conditioned(3, 300, 20, kappa)
    z = np.asarray(nys.linalg.orthonormalize(jnp.asarray(x)))
    assert np.linalg.norm(z.T @ z - np.eye(20)) <= 1e-13
    assert np.linalg.norm(x - z @ (z.T @ x)) <= 1e-13
    q, r = np.linalg.qr(x)
    peer = np.linalg.solve(r, q.T).T
    d = np.asarray(nys.linalg.dual(jnp.asarray(x)))
    # Both are exact for matrices within a few eps of X, so they differ by eps·κ, and no more.
    assert np.linalg.norm(d - peer) <= 50 * EPS * kappa * np.linalg.norm(peer)
    defect = np.linalg.norm(d.T @ x - np.eye(20))
    assert defect <= 20 * np.linalg.norm(peer.T @ x - np.eye(20)) + 50 * EPS


# --- Exact trajectories --------------------------------------------------------------------------


@settings(max_examples=6)
@given(
    seeds,
    st.one_of(st.just(0.5), st.floats(0.05, 1.0)),
    st.sampled_from([R, R + 3]),
)
def test_symmetric_run_follows_its_closed_form_to_rounding(seed, learning_rate, rank):
    a, basis = psd(seed)
    spectrum = jnp.array([1.0, 0.8, 0.5, 0.2])
    x0 = nys.initializers.nystrom(jax.random.key(seed // 2), a, rank)
    record = Partial(lambda q, s, x: nys.optimality.residual_in_basis(x, q, s), basis, spectrum)
    step = nys.solvers.scaled_step(nys.problems.Symmetric(a), learning_rate)
    found = np.asarray(nys.solvers.run(step, x0, 12, record).history)
    expected = np.asarray(nys.dynamics.symmetric_errors(basis.T @ x0, spectrum, learning_rate, 12))
    # Rounding of the start: a direction of size 1/d grows to d in the first step.
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-12 * (1 + expected.max()))


def test_closed_form_goes_on_below_rounding_and_squares():
    phi = jnp.asarray(conditioned(0, 4, 4, 10.0))
    errors = np.asarray(nys.dynamics.symmetric_errors(phi, jnp.ones(4), 0.5, 11))
    assert np.all(errors[5:] < errors[4:-1])
    small = errors[(errors < 1e-3) & (errors > 1e-150)]
    assert small.min() < 1e-60
    # d² − 1 = e: e⁺ = e²/(4(1 + e)) for the slowest direction, the only one left.
    np.testing.assert_allclose(small[1:], small[:-1] ** 2 / 4, rtol=2e-3)


@settings(max_examples=6)
@given(seeds, st.floats(0.05, 1.0), st.sampled_from([R, R + 3]))
def test_asymmetric_product_is_a_multiple_of_the_matrix(seed, learning_rate, rank):
    a, _, _ = rectangular(seed)
    start = nys.initializers.nystrom_factors(jax.random.key(seed // 2), a, rank)
    step = nys.solvers.scaled_step(nys.problems.Asymmetric(a), learning_rate)
    products = nys.solvers.run(step, start, 6, record=lambda f: f.left @ f.right.T).history[1:]
    scale = 1 + nys.dynamics.asymmetric_scale(learning_rate, 6)
    np.testing.assert_allclose(products, scale[:, None, None] * a, atol=1e-11)


def test_under_parametrized_subspace_turns_at_the_predicted_rate():
    spectrum = jnp.array([1.0, 0.9, 0.8, 0.6, 0.5])
    a, basis = psd(0, spectrum)
    x0 = nys.initializers.nystrom(jax.random.key(1), a, 3)
    problem = nys.problems.Symmetric(a)
    best = problem.loss(problem.optimum(3))

    def record(q, p, f, x):
        return jnp.sin(nys.optimality.principal_angles(x, q[:, :3])[-1]), p.loss(x) - f

    step = nys.solvers.scaled_step(problem, 0.5)
    angle, excess = nys.solvers.run(step, x0, 90, Partial(record, basis, problem, best)).history
    rate = float(nys.dynamics.subspace_rate(spectrum, 3, 0.5))
    np.testing.assert_allclose(rate, 1 - 0.5 * (1 - 0.6 / 0.8), rtol=1e-12)
    np.testing.assert_allclose((angle[90] / angle[60]) ** (1 / 30), rate, rtol=1e-3)
    np.testing.assert_allclose((excess[75] / excess[55]) ** (1 / 20), rate**2, rtol=1e-2)


# --- Gradients -----------------------------------------------------------------------------------


def test_automatic_derivatives_of_the_losses_are_their_gradients():
    problem = nys.problems.Symmetric(psd()[0])
    x = normal(1, (M, R))
    chex.assert_trees_all_close(jax.grad(problem.loss)(x), problem.gradient(x), rtol=1e-11)
    problem = nys.problems.Asymmetric(rectangular()[0])
    pair = nys.Factors(normal(1, (M, R)), normal(2, (N, R)))
    chex.assert_trees_all_close(jax.grad(problem.loss)(pair), problem.gradient(pair), rtol=1e-11)


def test_dual_is_differentiable():
    x, direction = normal(1, (20, R)), normal(2, (20, R))

    def reference(x):
        return x @ jnp.linalg.inv(x.T @ x)

    found = jax.jvp(nys.linalg.dual, (x,), (direction,))[1]
    chex.assert_trees_all_close(
        found, jax.jvp(reference, (x,), (direction,))[1], rtol=1e-8, atol=1e-10
    )


def test_gradient_descent_is_the_same_by_hand():
    problem = nys.problems.Symmetric(psd()[0])
    x0 = normal(1, (M, R)) / 10
    step = nys.solvers.gradient_step(problem, optax.sgd(0.01))
    x = x0
    for _ in range(3):
        x = x - 0.01 * (x @ x.T - problem.a) @ x
    chex.assert_trees_all_close(nys.solvers.run(step, x0, 3).params, x, rtol=1e-12)


# --- float32 stays float32 beside scalars of NumPy, which are float64 ----------------------------


def test_scalars_of_numpy_do_not_widen_starts_and_steps():
    a, half, key = jnp.eye(M, dtype=jnp.float32), np.float64(0.5), jax.random.key(0)
    x = nys.initializers.nystrom(key, a, R, half)
    starts = x, nys.initializers.perturbed(key, a, R, noise=half)
    project = Partial(nys.problems.completion.project_incoherent, bound=half)
    problem = nys.problems.Symmetric(a)
    steps = (
        nys.solvers.scaled_step(problem, half, damping=half),
        nys.solvers.gradient_step(problem, optax.sgd(half), project),
    )
    ends = [nys.solvers.run(step, x, 2).params for step in steps]
    assert {z.dtype for z in (*starts, *ends)} == {jnp.dtype("float32")}
