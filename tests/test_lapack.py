"""LAPACK on CPUs gets single matrices, whatever `vmap` says: jaxlib's batched kernels can hang."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from scale_cases import GRADIENT_STEPS, MEASURES, STARTS, STEPS, TRANSFORMS

import nyscaled as nys

CALL = re.compile(r"custom_call @(lapack_\w+|blas_\w+)\(.*?: \((.*?)\) -> ")


def batched_calls(fn, *args):
    """LAPACK's calls of more than one matrix in the program of `fn`, and the number of calls."""
    calls = CALL.findall(jax.jit(fn).lower(*args).as_text())
    batched = [
        (name, operands)
        for name, operands in calls
        if any(shape.count("x") > 2 for shape in re.findall(r"tensor<(.*?)>", operands))
    ]
    return batched, len(calls)


ROOTS = jnp.array([1.0, 2.0])
CASES = STEPS | GRADIENT_STEPS | STARTS | MEASURES | TRANSFORMS


def test_check_sees_a_batch():
    batched, count = batched_calls(jax.vmap(jnp.linalg.cholesky), jnp.ones((2, 3, 3)))
    assert (len(batched), count) == (1, 1)


@pytest.mark.long_beyond(6)
@pytest.mark.parametrize("name", CASES)
def test_no_program_of_a_batch_of_problems_calls_lapack_for_a_batch(name):
    batched, _ = batched_calls(jax.vmap(CASES[name]), ROOTS)
    assert not batched


OTHERS = {
    "psd": lambda key: nys.spectra.psd(key, 6, [1.0, 0.5])[0],
    "rectangular": lambda key: nys.spectra.rectangular(key, 6, 5, [1.0, 0.5])[0],
    "sensing": lambda key: nys.problems.sensing.gaussian(key, 6, [1.0], 9)[1],
    "robust": lambda key: nys.problems.robust.corrupted(key, 6, 5, [1.0], 0.1)[1],
    "core": lambda key: nys.dynamics.core_step(jnp.eye(3), jax.random.uniform(key, (3,)), 0.5),
    "relative_core": lambda key: nys.dynamics.relative_core_step(
        jax.random.normal(key, (3, 3)), 0.5
    ),
    "unbalance": lambda key: nys.solvers.unbalance(
        nys.Factors(jax.random.normal(key, (6, 2)), jnp.ones((5, 2))), 1.0
    ),
    **{
        f"lora_{init}": lambda key, init=init: nys.lora.inits.KERNEL_INITS[init](
            key, jax.random.normal(key, (8, 6)), 2, 1.0
        )
        for init in ("nora", "pissa", "milora", "olora", "orthogonal")
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_nor_do_other_functions(name):
    batched, _ = batched_calls(jax.vmap(OTHERS[name]), jax.random.split(jax.random.key(0), 2))
    assert not batched


@pytest.mark.long
@pytest.mark.parametrize("name", ["scaled_over", "pair", "qdwh", "gradient_pseudo"])
def test_nor_do_gradients(name):
    def loss(root):
        return sum(jnp.sum(x) for x in jax.tree.leaves(CASES[name](root)[:-1]))

    batched, count = batched_calls(jax.vmap(jax.grad(loss)), ROOTS)
    assert count > 0
    assert not batched


@pytest.mark.long
def test_batches_have_the_results_of_single_matrices_and_derivatives():
    x = normal(0, (2, 3, 7, 4))

    def everything(x):
        gram = x.T @ x
        u, s, vt = nys.lapack.svd(x)
        values, vectors = nys.lapack.eigh(gram)
        q, r = nys.lapack.qr(x)
        solved = nys.lapack.solve(gram, jnp.eye(4))
        return u * s @ vt, vectors * values @ vectors.T, q @ r, solved @ gram, s

    def change(x):
        return jax.jvp(everything, (x,), (jnp.ones_like(x),))

    found = jax.jit(jax.vmap(jax.vmap(change)))(x)
    single = jax.jit(change)
    for i in range(2):
        for j in range(3):
            for f, w in zip(jax.tree.leaves(found), jax.tree.leaves(single(x[i, j])), strict=True):
                np.testing.assert_allclose(f[i, j], w, rtol=1e-3, atol=1e-4)
    gram = jnp.swapaxes(x, -1, -2) @ x
    dgram = jnp.swapaxes(x, -1, -2) @ jnp.ones_like(x)
    expected = (x, gram, x, jnp.broadcast_to(jnp.eye(4), gram.shape))
    tangents = (1.0, dgram + jnp.swapaxes(dgram, -1, -2), 1.0, 0.0)
    for (value, tangent), (w, dw) in zip(
        zip(*(t[:4] for t in found), strict=True), zip(expected, tangents, strict=True), strict=True
    ):
        np.testing.assert_allclose(value, w, atol=1e-3)
        np.testing.assert_allclose(tangent, jnp.broadcast_to(dw, w.shape), atol=2e-2)


STRESS = """
import jax, jax.numpy as jnp, time, nyscaled as nys
keys = jax.random.split(jax.random.key(0), 8)

def one(key):
    a, basis = nys.spectra.psd(key, 80, [1.0, 0.5, 0.1])
    runs = []
    for rank in (2, 3, 5):
        start = nys.initializers.nystrom(key, a, rank)
        for make in (nys.solvers.scaled_step, nys.solvers.qdwh_step):
            runs.append(nys.solvers.run(make(nys.problems.Symmetric(a)), start, 4).params)
        start = nys.initializers.nystrom_factors(key, a, rank)
        runs.append(nys.solvers.run(nys.solvers.scaled_step(nys.problems.Asymmetric(a)), start,
        4).params)
    return runs

program, end = jax.jit(jax.vmap(one)), time.monotonic() + 20
jax.block_until_ready(program(keys))
while time.monotonic() < end:
    jax.block_until_ready((program(keys), program(keys[::-1])))
"""


@pytest.mark.long
def test_batches_of_runs_end():
    plain = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    subprocess.run([sys.executable, "-c", STRESS], env=plain, timeout=600, check=True)


def test_second_derivatives_in_a_scalar_pass_through_factorizations():
    x = normal(0, (6, 3))

    def value(damping):
        return jnp.sum(jnp.sin(nys.linalg.dual(x, damping)))

    def plain(damping):
        return jnp.sum(jnp.sin(x @ jnp.linalg.inv(x.T @ x + damping * jnp.eye(3))))

    def scanned(fn):
        return lambda d: jax.lax.scan(lambda c, _: (c + fn(c), None), d, length=2)[0]

    found, expected = (jax.jit(jax.hessian(scanned(fn)))(0.3) for fn in (value, plain))
    np.testing.assert_allclose(found, expected, rtol=1e-2)
    assert not batched_calls(jax.hessian(scanned(value)), 0.3)[0]
