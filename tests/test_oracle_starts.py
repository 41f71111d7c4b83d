"""Starts of problems without A: from gradients, and the spectral one, against 𝒜*(b) in full."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import KEY, R, normal, operator, psd, rectangular

import nyscaled as nys

M, N, P = 20, 16, 150
SPECTRUM = (1.0, 0.5)
initializers, problems = nys.initializers, nys.problems
sensing, completion = problems.sensing, problems.completion


def completed(left, right=None):
    rows, columns = jax.random.randint(KEY, (2, P), 0, jnp.array([[M], [len(right)]]))
    values = jnp.sum(left[rows] * right[columns], axis=1)
    return completion.observed(rows, columns, values, (M, len(right)))


X, Y = normal(1, (M, 2)), normal(2, (N, 2))
SQUARE = {
    "sensing": lambda: sensing.gaussian(KEY, M, SPECTRUM, P)[0],
    "completion": lambda: completed(X, X),
    "phase": lambda: problems.phase.gaussian(KEY, M, SPECTRUM, P)[0],
}
RECTANGULAR = {
    "sensing": lambda: sensing.gaussian_factors(KEY, M, N, SPECTRUM, P)[0],
    "completion": lambda: completed(X, Y),
}


def one_bit(exact):
    return lambda: problems.OneBit(exact().map, jax.nn.sigmoid(exact().b))


SQUARE["onebit"] = one_bit(SQUARE["sensing"])
RECTANGULAR["onebit"] = one_bit(RECTANGULAR["sensing"])


def dense_target(problem):
    """−∇ of the misfit in M at M = 0, by automatic differentiation, from measurements of e_ieⱼᵀ."""
    m, n = problem.shape

    def predicted(matrix):
        return problem.map.forward(matrix, jnp.eye(n))

    return -jax.grad(lambda z: problem.misfit(predicted(z)))(jnp.zeros((m, n)))


def relative(x, expected):
    x, expected = np.asarray(x, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(x - expected) / np.linalg.norm(expected)


@pytest.mark.long
@pytest.mark.parametrize("name", SQUARE)
def test_symmetric_gradient_gives_the_sketch_of_the_target(name):
    problem = SQUARE[name]()
    b = dense_target(problem)
    omega = initializers.random_sketch(KEY, M, 2, 1.0, "gaussian", jnp.float32)
    for scale in (1e-4, 1.0, 1e4):
        x0 = initializers.nystrom_from_gradient(KEY, problem.gradient, M, 2, scale)
        assert relative(x0, scale * (b + b.T) / 2 @ omega) < 2e-5
    # A.4 with the gradient at Ω itself is far from it where 𝒜*𝒜 ≠ I.
    literal = omega @ (omega.T @ omega) - problem.gradient(omega)
    assert relative(literal, (b + b.T) / 2 @ omega) > 0.5


@pytest.mark.long
@pytest.mark.parametrize("name", RECTANGULAR)
def test_gradient_at_zero_and_a_sketch_gives_its_image(name):
    problem = RECTANGULAR[name]()
    b = dense_target(problem)
    omega = initializers.random_sketch(KEY, N, 2, 0.5, "gaussian", jnp.float32)
    x0, y0 = initializers.nystrom_factors_from_gradient(KEY, problem.gradient, (M, N), 2, 0.5)
    assert relative(x0, b @ omega) < 1e-5
    chex.assert_trees_all_equal(y0, jnp.zeros((N, 2)))
    same = initializers.nystrom_factors(KEY, problem.target(), 2, 0.5)
    chex.assert_trees_all_close(x0, same.left, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SQUARE)
def test_target_is_minus_the_gradient_at_zero(name):
    problem = SQUARE[name]()
    b = dense_target(problem)
    for symmetric, expected in ((False, b), (True, (b + b.T) / 2)):
        found = problem.target()
        found = nys.linalg.symmetric_part(found) if symmetric else found
        assert relative(found @ jnp.eye(M), expected) < 1e-5
        assert relative(found.T @ jnp.eye(M), expected.T) < 1e-5


@pytest.mark.long
def test_full_information_gives_the_start_of_the_paper():
    truth = normal(1, (M, 2)) / M**0.5
    rows, columns = jnp.divmod(jnp.arange(M * M), M)
    a = truth @ truth.T
    problem = completion.observed(rows, columns, a.ravel(), (M, M))
    for scale in (1e-3, 1.0, 1e3):
        expected = initializers.nystrom(KEY, a, 2, scale)
        found = initializers.nystrom_from_gradient(KEY, problem.gradient, M, 2, scale)
        assert relative(found, expected) < 1e-5
        assert relative(
            initializers.rescaled(found, problem), initializers.rescaled(expected, a)
        ) < (1e-5)
    x, y = initializers.spectral(problem, 2)
    assert relative(x @ y.T, a) < 1e-5


def singular(problem, symmetric):
    """The best approximation of rank 2 of the target, by NumPy."""
    b = np.asarray(dense_target(problem), np.float64)
    if symmetric:
        values, vectors = np.linalg.eigh((b + b.T) / 2)
        return (vectors[:, -2:] * np.maximum(values[-2:], 0)) @ vectors[:, -2:].T
    u, s, vt = np.linalg.svd(b)
    return (u[:, :2] * s[:2]) @ vt[:2]


@pytest.mark.long_beyond(2)
@pytest.mark.parametrize("symmetric", [False, True], ids=["factors", "symmetric"])
@pytest.mark.parametrize("name", SQUARE)
def test_spectral_start_of_measurements_is_that_of_the_target(name, symmetric):
    problem = SQUARE[name]()
    start = initializers.spectral(problem, 2, symmetric=symmetric)
    x, y = start if isinstance(start, nys.Factors) else (start, start)
    chex.assert_shape(x, (M, 2))
    assert relative(x @ y.T, singular(problem, symmetric)) < 0.02
    np.testing.assert_allclose(x.T @ x, y.T @ y, atol=1e-3)  # balanced


def test_spectral_start_by_products_is_the_matrix_of_low_rank():
    a, b = psd()[0], rectangular()[0]
    x = initializers.spectral(problems.Symmetric(operator(a)), R)
    assert relative(x @ x.T, a) < 1e-5
    x, y = initializers.spectral(problems.Asymmetric(operator(b)), R)
    assert relative(x @ y.T, b) < 1e-5
    lower = initializers.spectral(problems.Symmetric(operator(a)), R - 1)
    np.testing.assert_allclose(np.linalg.norm(lower @ lower.T - a), 0.2, rtol=1e-4)


def test_spectral_start_forms_no_matrix():
    m, p = 2000, 4000

    def start(rows, columns, values):
        problem = completion.observed(rows, columns, values, (m, m))
        return initializers.spectral(problem, 2), initializers.spectral(problem, 2, symmetric=True)

    index, value = (jax.ShapeDtypeStruct((p,), d) for d in (jnp.int32, jnp.float32))
    memory = jax.jit(start).lower(index, index, value).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.3 * m * m * 4


def test_rescaled_start_has_the_least_loss_on_its_ray():
    problem = SQUARE["sensing"]()
    x0 = initializers.nystrom_from_gradient(KEY, problem.gradient, M, 2)
    found = [initializers.rescaled(x, problem) for x in (x0, 1e4 * x0)]
    chex.assert_trees_all_close(*found, rtol=1e-4)
    losses = [float(problem.loss(c * found[0])) for c in (0.98, 1.0, 1.02)]
    assert losses[1] < min(losses[0], losses[2])
    # Quadratic measurements see the trace: the spectral start alone is far too long.
    problem = SQUARE["phase"]()
    start = initializers.spectral(problem, 2, symmetric=True)
    assert problem.loss(initializers.rescaled(start, problem)) < 0.5 * problem.loss(start)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: initializers.spectral(RECTANGULAR["sensing"](), 2, symmetric=True), "square"),
        (lambda: initializers.spectral(RECTANGULAR["completion"](), 0), "rank is 0"),
        (lambda: initializers.spectral(RECTANGULAR["completion"](), N + 1), f"rank is {N + 1}"),
        (lambda: initializers.spectral(RECTANGULAR["sensing"](), N + 1), f"rank is {N + 1}"),
        (lambda: initializers.rescaled(jnp.zeros((M, 2)), SQUARE["sensing"]()), "positive"),
        (lambda: initializers.rescaled(X, RECTANGULAR["sensing"]()), "expected Factors"),
        (lambda: initializers.rescaled(X[1:], SQUARE["sensing"]()), "expected"),
    ],
)
def test_bad_input_is_refused_with_a_reason(make, expected):
    with pytest.raises(ValueError, match=expected):
        make()
