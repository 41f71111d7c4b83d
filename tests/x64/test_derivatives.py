"""float64: derivatives through runs agree in both modes and with central differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nyscaled as nys

M, N, RANK = 12, 9, 3  # of A
RNG = np.random.default_rng(0)
LEFT, RIGHT, WEIGHTS = (jnp.asarray(RNG.standard_normal(s)) for s in ((M, 3), (N, 3), (M + N, 5)))
solvers = nys.solvers


def symmetric(make, steps=3):
    """A function of a factor of A, of the sketch and of η to a number that sees X and the error."""

    def final(b, omega, eta):
        problem = nys.problems.Symmetric(b @ b.T)
        x = solvers.run(make(problem, eta), problem.a @ omega, steps).params
        return jnp.sum(jnp.sin(x) * WEIGHTS[:M, : x.shape[1]]) + problem.residual(x)

    return final, M


def pair(make, steps=3):
    def final(b, omega, eta):
        problem = nys.problems.Asymmetric(b @ RIGHT.T)
        start = nys.Factors(problem.a @ omega, jnp.zeros_like(omega))
        stacked = jnp.concatenate(solvers.run(make(problem, eta), start, steps).params)
        return jnp.sum(jnp.sin(stacked) * WEIGHTS[:, : stacked.shape[1]])

    return final, N


CASES = {
    "scaled": symmetric(lambda p, eta: solvers.scaled_step(p, eta)),
    "pair": pair(lambda p, eta: solvers.scaled_step(p, eta)),
    "damped": symmetric(lambda p, eta: solvers.scaled_step(p, eta, damping=0.1)),
    "newton": symmetric(lambda p, eta: solvers.scaled_newton_step(p)),
    "newton_optimal": symmetric(lambda p, eta: solvers.scaled_newton_step(p, "optimal")),
    "newton_frobenius": symmetric(lambda p, eta: solvers.scaled_newton_step(p, "frobenius")),
    "qdwh": symmetric(lambda p, eta: solvers.qdwh_step(p), 2),
    "pseudo_inverse": symmetric(
        lambda p, eta: solvers.gradient_step(p, nys.scaled_gd(0.4, pseudo_inverse=True))
    ),
}


SHORT = ("scaled", "pair")
LONG = [pytest.param(rank, marks=pytest.mark.long) for rank in (RANK - 1, RANK)]


@pytest.mark.parametrize("rank", [RANK + 2, *LONG])
@pytest.mark.parametrize(
    "name",
    [n if n in SHORT else pytest.param(n, marks=pytest.mark.long) for n in CASES],
)
def test_reverse_mode_is_forward_mode_is_central_differences(name, rank):
    final, side = CASES[name]
    rng = np.random.default_rng(rank)
    point = LEFT, jnp.asarray(rng.standard_normal((side, rank))), jnp.asarray(0.4)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape)), point)
    compiled = jax.jit(final)
    gradient = jax.jit(jax.grad(final, (0, 1, 2)))(*point)
    reverse = sum(jnp.sum(g * d) for g, d in zip(gradient, direction, strict=True))
    forward = jax.jit(lambda p, d: jax.jvp(final, p, d)[1])(point, direction)

    def at(h):
        return compiled(*(x + h * d for x, d in zip(point, direction, strict=True)))

    h = 1e-5
    central = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    np.testing.assert_allclose(reverse, forward, rtol=1e-10)
    np.testing.assert_allclose(reverse, central, rtol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("name", ["newton", "newton_optimal", "newton_frobenius"])
def test_both_modes_agree_through_newton_from_any_start(name):
    final, side = CASES[name]
    gradient = jax.jit(jax.grad(final, 1))
    forward = jax.jit(lambda b, x, d: jax.jvp(lambda x: final(b, x, 0.4), (x,), (d,))[1])
    for rank in (RANK, RANK + 2):
        for seed in range(8):
            rng = np.random.default_rng(seed)
            omega, d = (jnp.asarray(rng.standard_normal((side, rank))) for _ in range(2))
            reverse = jnp.sum(gradient(LEFT, omega, 0.4) * d)
            np.testing.assert_allclose(reverse, forward(LEFT, omega, d), rtol=1e-9)


@pytest.mark.parametrize("rank", [RANK, RANK + 2])
def test_gradients_of_gradients_are_differences_of_derivatives(rank):
    final, side = CASES["scaled"]
    b, omega = LEFT, jnp.asarray(RNG.standard_normal((side, rank)))

    def along(t, derivative):
        return derivative(lambda b: final(b, omega, 0.5), b + t * WEIGHTS[:side, :RANK])

    def forward(f, x):
        return jax.jvp(f, (x,), (WEIGHTS[:side, :RANK],))[1]

    def reverse(f, x):
        return jnp.vdot(jax.grad(f)(x), WEIGHTS[:side, :RANK])

    second = jax.jit(jax.grad(lambda t: along(t, reverse)))(0.0)
    first = jax.jit(lambda t: along(t, forward))
    differences = (first(1e-5) - first(-1e-5)) / 2e-5
    np.testing.assert_allclose(second, differences, rtol=1e-5)
