"""Contracts that every problem must meet, each measured against its definition in float64."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal

import nyscaled as nys
from nyscaled.typing import Problem

M, N, R, P = 12, 9, 3, 100
SPECTRUM = (1.0, 0.5)
problems = nys.problems


class Case(NamedTuple):
    """A problem whose loss is 0 at `truth`, a generic point, and the loss in NumPy."""

    problem: Problem
    truth: object
    point: object
    exact_loss: object


def pair(seed, m=M, n=N, rank=R):
    return nys.Factors(normal(seed, (m, rank)), normal(seed + 1, (n, rank)))


def product(point):
    """XXᵀ or XYᵀ in float64."""
    x, y = point if isinstance(point, nys.Factors) else (point, point)
    return np.asarray(x, np.float64) @ np.asarray(y, np.float64).T


def half(point):
    """The weight of a squared error: ¼ at X, and ½ at `Factors`."""
    return 0.5 if isinstance(point, nys.Factors) else 0.25


def true_factors(key, symmetric):
    left = nys.spectra.random_factor(key, M, SPECTRUM, M)
    if symmetric:
        return left, normal(7, (M, R))
    right = nys.spectra.random_factor(jax.random.fold_in(key, 1), N, SPECTRUM, N)
    return nys.Factors(left, right), pair(7)


def exact(key, symmetric):
    """Problems (1) and (4)."""
    truth, point = true_factors(key, symmetric)
    a = jnp.asarray(product(truth), jnp.float32)
    problem = problems.Symmetric((a + a.T) / 2) if symmetric else problems.Asymmetric(a)
    return Case(problem, truth, point, lambda p: half(p) * np.sum((product(p) - a) ** 2))


def matrices(linear_map):
    """The matrices of a `MeasurementMap`, (p, m, n)."""
    columns = jnp.eye(linear_map.shape[1])
    images = jax.vmap(lambda w: linear_map.adjoint(w) @ columns)(jnp.eye(linear_map.count))
    return np.asarray(images, np.float64)


def sensed(problem, truth, point):
    a, b = matrices(problem.map), np.asarray(problem.b, np.float64)

    def loss(p):
        return half(p) * np.sum((np.einsum("pij,ij->p", a, product(p)) - b) ** 2)

    return Case(problem, truth, point, loss)


def sensing(key, symmetric):
    if symmetric:
        problem, truth = problems.sensing.gaussian(key, M, SPECTRUM, P)
        return sensed(problem, truth, normal(7, (M, R)))
    problem, truth = problems.sensing.gaussian_factors(key, M, N, SPECTRUM, P)
    return sensed(problem, truth, pair(7))


def phase(key, symmetric):
    problem, truth = problems.phase.gaussian(key, M, SPECTRUM, P)
    return sensed(problem, truth, normal(7, (M, R)))


def completion(key, symmetric):
    truth, point = true_factors(key, symmetric)
    n = M if symmetric else N
    rows, columns = jnp.divmod(jax.random.permutation(key, M * n)[: 3 * M * n // 4], n)
    values = jnp.asarray(product(truth), jnp.float32)[rows, columns]
    return sensed(problems.completion.observed(rows, columns, values, (M, n)), truth, point)


def onebit(key, symmetric):
    if symmetric:
        problem, truth = problems.onebit.gaussian(key, M, SPECTRUM, P)
        point = normal(7, (M, R))
    else:
        problem, truth = problems.onebit.gaussian_factors(key, M, N, SPECTRUM, P)
        point = pair(7)
    a, b = matrices(problem.map), np.asarray(problem.b, np.float64)
    scale = problem.noise_scale

    def loss(p):
        z = np.einsum("pij,ij->p", a, product(p)) / scale
        divergence = b * np.log(b * (1 + np.exp(-z))) + (1 - b) * np.log((1 - b) * (1 + np.exp(z)))
        return 8 * half(p) * scale**2 * np.sum(divergence)

    return Case(problem, truth, point, loss)


def robust(key, symmetric):
    corrupted, truth = problems.robust.corrupted(key, M, N, SPECTRUM, fraction=0.12)
    problem = problems.RobustPCA(corrupted.observed, corrupted.fraction, slack=1.0)
    observed = np.asarray(problem.observed, np.float64)

    def loss(p):
        residual = product(p) - observed
        size = np.abs(residual)
        row, column = np.sort(size, axis=1)[:, -1], np.sort(size, axis=0)[-1]  # one of each
        sparse = (size >= row[:, None]) & (size >= column)
        return np.sum(np.where(sparse, 0, residual) ** 2) / 2

    return Case(problem, truth, pair(7), loss)


MAKERS = {
    "symmetric": (exact, True),
    "asymmetric": (exact, False),
    "sensing": (sensing, True),
    "sensing_pair": (sensing, False),
    "completion": (completion, True),
    "completion_pair": (completion, False),
    "onebit": (onebit, True),
    "onebit_pair": (onebit, False),
    "phase": (phase, True),
    "robust": (robust, False),
}


def make(name, seed=0):
    maker, symmetric = MAKERS[name]
    return maker(jax.random.key(seed), symmetric)


@pytest.fixture(scope="module", params=MAKERS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def case(name):
    return make(name)


@jax.jit
def evaluate(problem, point):
    """The loss and its root, the gradient by hand, and the automatic one."""
    loss, gradient = jax.value_and_grad(type(problem).loss, argnums=1)(problem, point)
    return loss, problem.root_loss(point), problem.gradient(point), gradient


@pytest.fixture(scope="module")
def values(case):
    return evaluate(case.problem, case.point)


def test_it_is_a_problem_of_a_matrix(case):
    assert isinstance(case.problem, Problem)
    assert case.problem.shape == product(case.point).shape
    assert case.problem.dtype == jnp.float32


def test_loss_and_its_root_follow_their_definition(case, values):
    expected = case.exact_loss(case.point)
    np.testing.assert_allclose(values[0], expected, rtol=1e-4)
    np.testing.assert_allclose(values[1], np.sqrt(expected), rtol=1e-4)
    chex.assert_shape(values[:2], ())


def test_gradient_is_the_automatic_one_in_the_form_of_the_point(case, values):
    by_hand, automatic = values[2:]
    scale = float(nys.numerics.tree_norm(automatic))
    chex.assert_trees_all_close(by_hand, automatic, atol=1e-4 * scale)
    chex.assert_trees_all_equal_shapes_and_dtypes(by_hand, case.point)


def test_loss_is_zero_and_the_gradient_too_at_the_truth(case, values):
    loss, _, gradient, _ = evaluate(case.problem, case.truth)
    assert loss < 1e-8 * values[0]
    norm = nys.numerics.tree_norm
    assert norm(gradient) < 1e-4 * norm(values[2])


def test_factor_size_is_about_the_size_of_the_truth(case):
    size = np.sqrt(np.linalg.norm(product(case.truth)))
    assert size / 4 < case.problem.factor_size() < 4 * size


def test_a_point_stays_itself_and_what_is_none_is_refused(case):
    problem, point = case.problem, case.point
    chex.assert_trees_all_equal(problem.check(point), point)
    bad = [
        jax.tree.map(lambda x: x[1:], point),
        jax.tree.map(lambda x: x[None], point),
        jax.tree.map(lambda x: jnp.tile(x, (1, M)), point),
        jax.tree.map(lambda x: x.astype(int), point),
        None,
    ]
    if isinstance(point, nys.Factors):
        bad.append(nys.Factors(point.left, point.right[:, 1:]))
    for value in bad:
        with pytest.raises(ValueError, match="expected"):
            problem.check(value)


def test_one_factor_in_place_of_a_pair_is_refused_by_problems_of_pairs(case):
    if isinstance(case.point, nys.Factors):
        with pytest.raises(ValueError, match="expected"):
            case.problem.check(case.point.left[: min(case.problem.shape)])
    elif case.problem.symmetric:
        with pytest.raises(ValueError, match="expected"):
            case.problem.check(nys.Factors(case.point, case.point))


def test_target_and_its_transpose_are_adjoint(case):
    target, (m, n) = case.problem.target(), case.problem.shape
    assert (tuple(target.shape), target.dtype) == ((m, n), jnp.float32)
    x, y = normal(1, (n, 2)), normal(2, (m, 2))
    forward, back = jnp.sum((target @ x) * y), jnp.sum(x * (target.T @ y))
    np.testing.assert_allclose(forward, back, rtol=1e-3, atol=1e-4)


def test_target_is_minus_the_gradient_in_the_product_at_zero(case):
    problem, (m, n) = case.problem, case.problem.shape
    target = np.asarray(problem.target() @ jnp.eye(n))
    if isinstance(case.point, nys.Factors):
        at = nys.Factors(jnp.zeros((m, n)), jnp.eye(n))
        found = -problem.gradient(at).left
    else:
        target = (target + target.T) / 2
        found = -jax.jvp(problem.gradient, (jnp.zeros((m, m)),), (jnp.eye(m),))[1]
    np.testing.assert_allclose(found, target, atol=1e-4 * np.abs(target).max())


def test_spectral_start_is_a_point_near_the_direction_of_the_truth(case):
    single = not isinstance(case.point, nys.Factors)
    start = nys.initializers.spectral(case.problem, len(SPECTRUM), symmetric=single)
    case.problem.check(start)
    found, truth = product(start), product(case.truth)
    cosine = np.sum(found * truth) / np.linalg.norm(found) / np.linalg.norm(truth)
    assert cosine > 0.5  # a random start has about 0.2


@pytest.mark.long_beyond(3)
def test_problems_are_batched_by_vmap(name, case, values):
    other = make(name, seed=1)
    both = ((c.problem, c.point) for c in (case, other))
    found = jax.vmap(evaluate)(*jax.tree.map(lambda *x: jnp.stack(x), *both))
    expected = jax.tree.map(lambda *x: jnp.stack(x), values, evaluate(other.problem, other.point))
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.long_beyond(2)
def test_scaled_gd_descends_from_near_the_truth(case):
    start = jax.tree.map(lambda x: 1.1 * x, case.truth)
    step = nys.solvers.gradient_step(case.problem, nys.scaled_gd(0.1))
    history = nys.solvers.run(step, start, 20, case.problem.loss).history
    assert history[-1] < 0.5 * history[0]
