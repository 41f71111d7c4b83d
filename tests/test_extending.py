"""The recipes of CONTRIBUTING.md, each followed with a toy."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import KEY, M, R, normal, psd
from flax import nnx

import nyscaled as nys
from nyscaled.solvers import Status
from nyscaled.transforms._pairwise import pairwise
from nyscaled.typing import Problem, Step


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Weighted:
    """f(X) = ¼ Σ wᵢⱼ((XXᵀ)ᵢⱼ − Aᵢⱼ)² with symmetric weights."""

    a: Any
    weights: Any
    symmetric = True
    shape = property(lambda self: self.a.shape)
    dtype = property(lambda self: self.a.dtype)

    def loss(self, x):
        return jnp.sum(self.weights * (x @ x.T - self.a) ** 2) / 4

    def gradient(self, x):
        return (self.weights * (x @ x.T - self.a)) @ x

    def target(self):
        return self.weights * self.a

    def check(self, x):
        if x.shape[0] != len(self.a):
            raise ValueError(f"X has shape {x.shape}; expected ({len(self.a)}, r)")
        return x


@pytest.fixture
def weighted():
    return Weighted(psd()[0], 1 + 0.1 * jnp.ones((M, M)))


def test_a_problem_runs_with_the_starts_and_steps_of_the_library(weighted):
    assert isinstance(weighted, Problem)
    start = nys.initializers.spectral(weighted, R)
    np.testing.assert_allclose(start @ start.T, weighted.target(), atol=1e-5)
    step = nys.solvers.gradient_step(weighted, nys.scaled_gd(0.4))
    solution = nys.solvers.run_until(step, 1.5 * start, weighted.loss, tol=1e-8, max_steps=60)
    assert solution.status is Status.CONVERGED
    np.testing.assert_allclose(solution.params @ solution.params.T, weighted.a, atol=1e-3)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PowerStep:
    """Block power iteration X⁺ = orthonormal basis of AX."""

    problem: Any
    limit: Any = 1e6

    def init(self, params):
        return self.problem.check(params)

    @jax.jit
    def update(self, state):
        return nys.linalg.orthonormalize(self.problem.target() @ state)

    def params(self, state):
        return state

    def status(self, state):
        return jnp.where(jnp.max(jnp.abs(state)) > self.limit, Status.DIVERGED, Status.MAX_STEPS)


def test_a_step_runs_in_both_loops_and_reports_its_failures():
    a, basis = psd()
    step = PowerStep(nys.problems.Symmetric(a))
    assert isinstance(step, Step)
    x = nys.solvers.run(step, normal(0, (M, R)), 30).params
    np.testing.assert_allclose(x @ x.T, basis @ basis.T, atol=1e-4)
    with pytest.raises(ValueError, match="ended DIVERGED by step 0"):
        nys.solvers.run_until(
            dataclasses.replace(step, limit=0.0), normal(0, (M, R)), jnp.linalg.norm, tol=0.0
        )


def columns(key, a, rank):
    """Columns of A, drawn at random."""
    a = nys.problems.Symmetric(a).target()
    return a @ jax.nn.one_hot(jax.random.permutation(key, M)[:rank], M).T


def test_a_start_is_a_function_of_a_key_and_a_matrix():
    a, _ = psd()
    problem = nys.problems.Symmetric(a)
    start = nys.initializers.rescaled(columns(KEY, a, R), problem)
    step = nys.solvers.scaled_step(problem)
    assert nys.solvers.run(step, start, 30, problem.residual).history[-1] < 1e-4


def scale_by_partner_norm(spec=None):
    """Divide each gradient by the squared norm of the partner."""

    def rule(position, gradient, factor, partner):
        return gradient / jnp.sum(partner**2)

    return pairwise(lambda state, **extra_args: rule, nys.pair_spec if spec is None else spec)


def test_a_transform_is_a_rule_for_one_gradient():
    factors = nys.Factors(normal(1, (5, 2)), normal(2, (4, 2)))
    tx = optax.chain(scale_by_partner_norm(), optax.scale(-1.0))
    updates, _ = tx.update(factors, tx.init(factors), factors)
    expected = -factors.left / jnp.sum(factors.right**2)
    np.testing.assert_allclose(updates.left, expected, rtol=1e-5)


def ones(key, kernel, rank, scaling):
    """A start of an adapter that does not look at the kernel."""
    return nys.lora.Start(jnp.ones((kernel.shape[0], rank)), None)


def test_a_start_of_adapters_is_a_function_of_a_kernel():
    model = nnx.Sequential(nnx.Linear(5, 4, rngs=nnx.Rngs(0)))
    x = normal(0, (3, 5))
    before = model(x)
    nys.lora.apply(model, rank=2, targets=".*", init=ones, key=KEY)
    np.testing.assert_array_equal(model(x), before)
    factors = [leaf for leaf in jax.tree.leaves(nnx.state(model)) if leaf.shape == (5, 2)]
    np.testing.assert_array_equal(factors, [np.ones((5, 2))])
