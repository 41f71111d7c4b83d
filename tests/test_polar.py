"""solvers.polar: scaled Newton and QDWH follow their formulas and need few steps."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from cases import FORMS, SPECTRUM, M, R, conditioned, exact_residual, normal, psd, rectangular

import nyscaled as nys

METHODS = {
    "byers_xu": nys.solvers.scaled_newton_step,
    "optimal": lambda p: nys.solvers.scaled_newton_step(p, "optimal"),
    "frobenius": lambda p: nys.solvers.scaled_newton_step(p, "frobenius"),
    "qdwh": nys.solvers.qdwh_step,
}


def itself(x):
    return x


def solve(method, a, x0, num_steps=5, record=itself, **kwargs):
    """A run; with the defaults, one compilation for each method."""
    step = METHODS[method](nys.problems.Symmetric(a))
    return nys.solvers.run(step, x0, num_steps, record, **kwargs)


def singular_values(x, basis):
    """σ(Σ^{-1/2}QᵀX) in float64."""
    scaled = np.asarray(basis, np.float64).T @ np.asarray(x, np.float64)
    return np.linalg.svd(scaled / np.sqrt(SPECTRUM)[:, None], compute_uv=False)


def newton_in_float64(x, a, mu):
    return (mu * x + a @ x @ np.linalg.inv(x.T @ x) / mu) / 2


def halley_in_float64(x, a, low):
    """X(aC + bI)(C + cI)⁻¹ as Nakatsukasa, Bai and Gygi weigh it, σ in [low, 1]."""
    d = (4 * (1 - low**2) / low**4) ** (1 / 3)
    one = np.sqrt(1 + d) + np.sqrt(8 - 4 * d + 8 * (2 - low**2) / (low**2 * np.sqrt(1 + d))) / 2
    two = (one - 1) ** 2 / 4
    dual = x @ np.linalg.inv(x.T @ x)
    gram, eye = dual.T @ a @ dual, np.eye(x.shape[1])
    new = x @ (one * gram + two * eye) @ np.linalg.inv(gram + (one + two - 1) * eye)
    return new, low * (one + two * low**2) / (1 + (one + two - 1) * low**2)


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize("method", METHODS)
def test_two_steps_are_those_of_the_formulas(method):
    a, basis = psd()
    start = basis @ jnp.asarray(conditioned(2, R, R, 5.0, np.float32))
    found = solve(method, a, start).history
    x, a = np.asarray(start, np.float64), np.asarray(a, np.float64)
    low, high = singular_values(x, basis)[[-1, 0]]
    if method == "qdwh":
        x, low = x / high, low / high
    for step in (1, 2):
        s = singular_values(x, basis)
        if method == "qdwh":
            x, low = halley_in_float64(x, a, low)
        elif method == "frobenius":
            x = newton_in_float64(x, a, (np.sum(s**-2) / np.sum(s**2)) ** 0.25)
        elif method == "optimal" or step == 1:
            x = newton_in_float64(x, a, (s[0] * s[-1]) ** -0.5)
        else:  # Byers and Xu's second weight
            mu = np.sqrt(2 * np.sqrt(low * high) / (low + high))
            x = newton_in_float64(x, a, mu)
        np.testing.assert_allclose(found[step], x, rtol=1e-4, atol=1e-5)


KAPPAS = (1e1, 1e2, 1e3, 1e4, 1e5)


@functools.partial(jax.jit, static_argnums=(0, 1))
def errors(method, rank, keys, spectra, scale):
    """Relative errors after t = 0 … 60 steps, (spectrum, start, t)."""

    def one(key, spectrum):
        a, basis = nys.spectra.psd(key, 200, spectrum)
        start = nys.initializers.nystrom(jax.random.fold_in(key, 1), a, rank, scale)

        def record(x):
            return nys.optimality.residual_in_basis(x, basis, spectrum) / jnp.linalg.norm(spectrum)

        return solve(method, a, start, 60, record).history

    return jax.vmap(jax.vmap(one, (0, None)), (None, 0))(keys, spectra)


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize(
    ("method", "rank"), [("byers_xu", 20), ("optimal", 20), ("qdwh", 20), ("qdwh", 30)]
)
def test_float32_ends_at_rounding_after_few_steps_for_every_condition(method, rank):
    spectra = jnp.asarray([np.append(np.linspace(1.0, 0.82, 19), 1 / k) for k in KAPPAS])
    keys = jax.random.split(jax.random.key(0), 3)
    scale = 0.1 if rank == 20 else 1e3
    curves = np.asarray(errors(method, rank, keys, spectra.astype(jnp.float32), scale))
    few = {"qdwh": 5, "byers_xu": 7}.get(method, 8)
    assert curves[..., few:].max() < 1.5e-6


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize(("method", "form"), [("optimal", "operator"), ("qdwh", "bcoo")])
def test_steps_agree_for_other_forms_of_the_matrix(method, form):
    a, _ = psd()
    x0 = nys.initializers.nystrom(jax.random.key(1), a, R)
    found, expected = (solve(method, f(a), x0).params for f in (FORMS[form], FORMS["dense"]))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_multiplies_by_the_matrix_once(method):
    a, products = psd()[0], []

    def multiply(x):
        products.append(x.shape)
        return a @ x

    step = METHODS[method](nys.problems.Symmetric(nys.linalg.Operator(multiply, multiply, (M, M))))
    state = jax.eval_shape(step.init, normal(1, (M, R)))
    products.clear()
    jax.eval_shape(step.update, state)
    assert products == [(M, R)]


def test_a_second_run_on_another_matrix_does_not_compile():
    sizes = []
    for seed in (0, 1):
        solve("qdwh", psd(seed)[0], normal(seed, (M, R)))
        sizes.append(nys.solvers.loops._scan._cache_size())
    assert sizes[0] == sizes[1]


@pytest.mark.long
def test_directions_without_weight_in_the_matrix_are_cut_for_the_whole_run():
    a, _ = psd()
    x0 = nys.initializers.nystrom(jax.random.key(1), a, R + 3)
    history = solve("qdwh", a, x0).history
    np.testing.assert_allclose(history[0], x0, atol=1e-5)
    assert np.linalg.svd(history[1:], compute_uv=False)[:, R].max() < 1e-6


def test_what_is_no_such_problem_is_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of tests
    for build in (nys.solvers.scaled_newton_step, nys.solvers.qdwh_step):
        with pytest.raises(ValueError, match=r"problem is a Asymmetric; expected problems\.Symm"):
            build(nys.problems.Asymmetric(rectangular()[0]))
        with pytest.raises(ValueError, match="X has shape"):
            build(nys.problems.Symmetric(psd()[0])).init(jnp.ones((M + 1, R)))
    with pytest.raises(ValueError, match="scaling is 'higham'; expected one of byers_xu, "):
        nys.solvers.scaled_newton_step(nys.problems.Symmetric(psd()[0]), "higham")


@pytest.mark.parametrize("method", ["byers_xu", "qdwh"])
def test_indefinite_matrix_ends_the_run(method):
    a = psd()[0] - 0.5 * jnp.eye(M)
    solution = solve(method, a, normal(1, (M, R)), throw=False)
    assert solution.status in (nys.solvers.Status.INDEFINITE, nys.solvers.Status.NON_FINITE)
    with pytest.raises(ValueError, match=r"positive semidefinite|NaN"):
        solve(method, a, normal(1, (M, R)))


@pytest.mark.long
@pytest.mark.parametrize("method", ["byers_xu", "qdwh"])
def test_eigenvalues_that_rounding_makes_negative_leave_bounds_and_the_run_sound(method):
    a, basis = psd(1, np.geomspace(1, 1e-9, 12))
    step = METHODS[method](nys.problems.Symmetric(a))
    for seed in range(3):
        # Columns of length 1: none is cut, and their form has κ(A).
        start = basis @ jax.random.orthogonal(jax.random.key(seed), 12)
        state = step.init(start)
        assert 1 < float(state.high / state.low) < 1e4
        solution = solve(method, a, start, 12)
        assert exact_residual(solution.params, a) < 1e-5
