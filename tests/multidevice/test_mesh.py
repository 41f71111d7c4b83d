"""A row-sharded over eight devices gives what one device gives, and no m-row array is gathered."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal, psd
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nyscaled as nys
from nyscaled.matrices import transpose_times

M, N, R = 64, 32, 4


@pytest.fixture(scope="module")
def rows():
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, P("rows", None))


def test_symmetric_iterates_agree_with_one_device(rows):
    a, _ = psd(m=M)
    x0 = nys.initializers.nystrom(jax.random.key(1), a, R)

    def history(a, x0):
        step = nys.solvers.scaled_step(nys.problems.Symmetric(a), 0.5)
        return nys.solvers.run(step, x0, 8, record=lambda x: x).history

    expected = history(a, x0)
    sharded = jax.device_put(a, rows)
    assert len(sharded.sharding.device_set) == 8
    found = jax.jit(history)(sharded, jax.device_put(x0, rows))
    np.testing.assert_allclose(
        found, expected, rtol=1e-5, atol=1e-5 * float(jnp.max(jnp.abs(expected)))
    )


def test_asymmetric_iterates_agree_with_one_device(rows):
    a, _, _ = nys.spectra.rectangular(jax.random.key(0), M, N, [1.0, 0.8, 0.5, 0.2])
    start = nys.initializers.nystrom_factors(jax.random.key(1), a, R)

    def final(a, start):
        step = nys.solvers.scaled_step(nys.problems.Asymmetric(a), 0.5)
        x, y = nys.solvers.run(step, start, 4).params
        return x @ y.T

    sharded = jax.device_put((a, start), rows)
    np.testing.assert_allclose(final(*sharded), final(a, start), atol=1e-5)


def test_nystrom_of_a_sharded_matrix_is_that_of_the_matrix(rows):
    a, _ = psd(m=M)
    found = nys.initializers.nystrom(jax.random.key(1), jax.device_put(a, rows), R)
    np.testing.assert_allclose(found, nys.initializers.nystrom(jax.random.key(1), a, R), atol=1e-5)


@pytest.mark.parametrize("fn", [nys.linalg.dual, nys.linalg.orthonormalize])
def test_factorization_of_a_sharded_factor_gathers_nothing(rows, fn):
    x = normal(0, (M, R))
    sharded = jax.device_put(x, rows)
    compiled = jax.jit(fn, out_shardings=rows).lower(sharded).compile()
    text = compiled.as_text()
    assert "all-reduce" in text  # of r×r Gram matrices
    assert "all-gather" not in text
    chex.assert_trees_all_close(compiled(sharded), fn(x), rtol=1e-4, atol=1e-5)


def test_sharded_residual_agrees_with_one_device(rows):
    a, _ = psd(m=M)
    x = normal(0, (M, R))
    found = nys.problems.Symmetric(jax.device_put(a, rows)).loss(jax.device_put(x, rows))
    np.testing.assert_allclose(found, nys.problems.Symmetric(a).loss(x), rtol=1e-5)


@pytest.mark.parametrize("spec", [P("rows", None), P(None, "rows"), P()])
def test_products_with_the_transpose_of_a_sharded_matrix_gather_nothing(rows, spec):
    a, x = normal(0, (M, N)), normal(1, (M, R))
    sharding = NamedSharding(rows.mesh, spec)
    thin = NamedSharding(rows.mesh, P(*spec[:1]))
    sharded = jax.device_put(a, sharding), jax.device_put(x, thin)
    compiled = jax.jit(transpose_times).lower(*sharded).compile()
    np.testing.assert_allclose(compiled(*sharded), a.T @ x, atol=1e-4)
    gathered = [line for line in compiled.as_text().splitlines() if "all-gather" in line]
    assert not [line for line in gathered if f"{M},{N}" in line]
