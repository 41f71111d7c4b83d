"""problems.robust: thresholding, and recovery from gross errors at a rate free of κ."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal

import nyscaled as nys

M, N, R = 60, 50, 2
robust = nys.problems.robust


def reference(a, fraction):
    """T_α by sorting, as the reference defines it: ties with the k-th largest are kept."""
    size = np.abs(a)
    rows, columns = round(fraction * a.shape[1]), round(fraction * a.shape[0])
    if min(rows, columns) == 0:
        return np.zeros_like(a)
    row = np.sort(size, axis=1)[:, -rows]
    column = np.sort(size, axis=0)[-columns]
    return np.where((size >= row[:, None]) & (size >= column), a, 0)


def of_scales(a):
    return a * jnp.exp(20 * normal(1, a.shape))


def with_ties(a):
    return jnp.round(2 * a)


@pytest.mark.parametrize("make", [jnp.asarray, of_scales, with_ties, jnp.zeros_like])
def test_threshold_follows_its_definition(make):
    a = make(normal(0, (M, N)))
    fractions = (0.0, 0.02, 0.1, 0.33, 1.0)
    found = jax.vmap(robust.threshold, (None, 0))(a, jnp.array(fractions))
    for one, fraction in zip(found, fractions, strict=True):
        np.testing.assert_array_equal(one, reference(np.asarray(a), fraction))


@pytest.fixture(scope="module")
def case():
    problem, truth = robust.corrupted(jax.random.key(0), M, N, [1.0, 0.5], fraction=0.1)
    return problem, truth, nys.Factors(normal(1, (M, R)) / M**0.5, normal(2, (N, R)) / N**0.5)


@pytest.mark.long
def test_sparse_part_is_the_threshold_of_twice_the_fraction(case):
    problem, truth, point = case
    (x, y), observed = (np.asarray(f) for f in point), np.asarray(problem.observed)
    sparse = reference(observed - x @ y.T, 0.2)
    np.testing.assert_allclose(problem.sparse(point), sparse, atol=1e-6)
    assert problem.loss(truth) < 1e-10
    full = nys.problems.Asymmetric(problem.observed - problem.sparse(point))
    np.testing.assert_allclose(problem.loss(point), full.loss(point), rtol=1e-4)


def test_corruption_is_within_its_fraction_and_of_its_size(case):
    problem, (left, right), _ = case
    truth = np.asarray(left @ right.T)
    wrong = np.abs(np.asarray(problem.observed) - truth)
    where = wrong > 1e-5
    assert 0.5 * 0.1 * N < where.sum(axis=1).mean() <= where.sum(axis=1).max() <= 0.1 * N
    assert where.sum(axis=0).max() <= 0.1 * M
    assert wrong[where].min() > 10 * np.sqrt(np.mean(truth**2))
    np.testing.assert_allclose(np.linalg.svd(truth)[1][:3], [1, 0.5, 0], atol=1e-6)


SCALED = nys.scaled_gd(0.5)


@functools.partial(jax.jit, static_argnums=0)
def curves(tx, fraction):
    """Errors relative to σ_r(M), over κ, from a start that is near M in units of σ_r(M)."""

    def run(kappa):
        spectrum = jnp.stack([jnp.ones_like(kappa), 1 / kappa])
        problem, truth = robust.corrupted(jax.random.key(0), M, N, spectrum, fraction=0.05)
        problem = robust.RobustPCA(problem.observed, fraction)
        away = nys.Factors(normal(1, (M, R)) / M**0.5, normal(2, (N, R)) / N**0.5)
        start = jax.tree.map(lambda f, e: f + 0.1 * e / jnp.sqrt(kappa), truth, away)
        target = truth.left @ truth.right.T

        def error(f):
            return kappa * jnp.linalg.norm(f.left @ f.right.T - target)

        step = nys.solvers.gradient_step(problem, tx)
        return nys.solvers.run(step, start, 40, error).history

    return jax.vmap(run)(jnp.array([10.0, 100.0]))


@pytest.mark.long
def test_scaled_gd_recovers_at_one_rate_whatever_the_condition_number():
    errors = np.asarray(curves(SCALED, 0.05))
    rates = (errors[:, 20] / errors[:, 5]) ** (1 / 15)
    assert rates.max() < 0.8
    np.testing.assert_allclose(rates[0], rates[1], atol=0.05)
    assert errors[0, -1] < 1e-5
    assert errors[1, -1] < 1e-4  # 1e-6 of ‖M‖


def test_gd_slows_with_the_condition_number():
    errors = np.asarray(curves(optax.sgd(0.5), 0.05))
    rates = (errors[:, 40] / errors[:, 20]) ** (1 / 20)
    assert rates[0] > 0.9
    assert rates[1] > 0.99


@pytest.mark.long
@pytest.mark.parametrize("fraction", [0.0201, 0.45])
def test_too_small_and_too_large_fractions_do_not_recover(fraction):
    """Errors that are not removed stay; and of entries nearly all removed nothing is learnt."""
    assert curves(SCALED, fraction).min() > 1e-2


@pytest.mark.parametrize("start", ["spectral", "nystrom"])
def test_starts_from_trimmed_entries_lead_to_the_matrix(start):
    problem, truth = robust.corrupted(jax.random.key(0), M, N, [1.0, 0.5], fraction=0.05)
    if start == "spectral":
        point = nys.initializers.spectral(problem, R)
    else:
        point = nys.initializers.nystrom_factors(jax.random.key(1), problem.target(), R)
    step = nys.solvers.gradient_step(problem, SCALED)
    solution = nys.solvers.run(step, point, 40)
    left, right = solution.params
    np.testing.assert_allclose(left @ right.T, truth.left @ truth.right.T, atol=1e-5)
    sparse = problem.observed - truth.left @ truth.right.T
    np.testing.assert_allclose(
        problem.sparse(solution.params) * (jnp.abs(sparse) > 1e-4), sparse, atol=1e-5
    )


@pytest.mark.long
def test_alternating_steps_run_on_it(case):
    problem, truth, _ = case
    start = jax.tree.map(lambda f: f + 0.02, truth)
    step = nys.solvers.alternating_step(problem, SCALED)
    history = nys.solvers.run(step, start, 40, problem.loss).history
    assert history[-1] < 1e-6 * history[0]


ONES = jnp.ones((3, 4))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: robust.RobustPCA(jnp.ones(3), 0.1), r"expected a matrix, \(m, n\)"),
        (lambda: robust.RobustPCA(jnp.ones((3, 4), int), 0.1), "dtype int32"),
        (lambda: robust.RobustPCA(ONES.at[0, 0].set(jnp.nan), 0.1), "NaN"),
        (lambda: robust.RobustPCA(jax.experimental.sparse.BCOO.fromdense(ONES), 0.1), "dense"),
        (lambda: robust.RobustPCA(ONES, 0.0), "fraction is 0"),
        (lambda: robust.RobustPCA(ONES, 0.1, slack=0.5), "slack is 0.5"),
        (lambda: robust.RobustPCA(ONES, 0.5), "less than 1"),
        (lambda: robust.RobustPCA(ONES, 0.1).check(ONES), "expected nyscaled.Factors"),
        (
            lambda: robust.RobustPCA(ONES, 0.1).check(nys.Factors(ONES[:, :1], ONES[:, :1])),
            r"expected \(4, r\)",
        ),
        (lambda: robust.threshold(ONES, 1.5), "fraction is 1.5"),
        (lambda: robust.corrupted(jax.random.key(0), 3, 4, [1.0], 0.1, size=0.0), "size is 0"),
    ],
)
def test_bad_input_is_refused_with_a_reason(make, expected):
    with pytest.raises(ValueError, match=expected):
        make()
