"""KernelMatrix and kernels: entries, products by blocks, pytrees, refusals."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.gaussian_process.kernels as peers
from cases import normal
from jax.tree_util import Partial
from test_lowering import assert_full_precision

import nyscaled as nys
from nyscaled.linalg import KernelMatrix, kernels

POINTS = {d: normal(d, (50, d)) for d in (3, 20)}  # by differences, and by products


def plain(x, y):
    """A kernel of somebody else."""
    return jnp.dot(x, y) ** 2


KERNELS = {
    "gaussian": (kernels.gaussian(0.7), peers.RBF(0.7)),
    "matern 1/2": (kernels.matern(2.0, 0.5), peers.Matern(2.0, nu=0.5)),
    "matern 3/2": (kernels.matern(2.0), peers.Matern(2.0, nu=1.5)),
    "matern 5/2": (kernels.matern(2.0, 2.5), peers.Matern(2.0, nu=2.5)),
    "plain": (plain, lambda x, y: (x @ y.T) ** 2),
    "laplace": (
        kernels.laplace(1.5),
        lambda x, y: np.exp(-np.abs(x[:, None] - y).sum(-1) / 1.5),
    ),
}


@pytest.mark.parametrize("d", POINTS)
@pytest.mark.parametrize("name", KERNELS)
def test_entries_and_products_are_those_of_the_kernel(name, d):
    kernel, peer = KERNELS[name]
    x = POINTS[d]
    expected = peer(*2 * (np.asarray(x, np.float64),))
    a = KernelMatrix(kernel, x)
    assert (a.shape, a.dtype) == ((50, 50), jnp.float32)
    size = float(np.abs(expected).max())
    # A root of a rounded square: 4e-3 for √(eps · 20) where points are the same.
    tolerance = 1e-2 if (name, d) == ("matern 1/2", 20) else 2e-5 * size
    chex.assert_trees_all_close(a.columns(jnp.array([3, 7])), expected[:, [3, 7]], atol=tolerance)
    chex.assert_trees_all_close(a.diagonal(), np.diag(expected), rtol=1e-5)
    y = normal(1, (50, 2))
    chex.assert_trees_all_close(a @ y, expected @ y, atol=50 * tolerance)
    chex.assert_trees_all_close(a @ y[:, 0], expected @ y[:, 0], atol=50 * tolerance)
    assert a.T is a


@pytest.mark.long
def test_a_product_of_several_blocks_is_that_of_one(monkeypatch):
    a = KernelMatrix(kernels.gaussian(0.7), POINTS[3])
    expected = a @ POINTS[3]
    jax.clear_caches()
    monkeypatch.setattr(kernels, "_ENTRIES", 7 * 50)  # 7 rows; 50 is not a multiple
    chex.assert_trees_all_close(a @ POINTS[3], expected, atol=1e-5)
    jax.clear_caches()


def test_a_product_takes_less_memory_than_the_matrix():
    a = KernelMatrix(kernels.gaussian(), jnp.zeros((20_000, 2)))
    compiled = jax.jit(lambda a, x: a @ x).lower(a, jnp.ones((20_000, 1))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 20_000**2 * 4 / 10


def test_length_scales_are_leaves_and_may_be_one_per_coordinate():
    x, scales = POINTS[3], jnp.array([0.5, 1.0, 2.0])
    entry = jax.jit(lambda s: KernelMatrix(kernels.gaussian(s), x).columns(jnp.array([0]))[1, 0])
    compiled = jax.grad(entry)(scales)
    chex.assert_shape(compiled, (3,))
    chex.assert_trees_all_close(entry(scales), entry(jnp.ones(3) * scales), atol=1e-6)
    unit = KernelMatrix(kernels.gaussian(), x / scales).columns(jnp.array([0]))[1, 0]
    chex.assert_trees_all_close(entry(scales), unit, atol=1e-6)
    before = entry._cache_size()
    entry(2 * scales)
    assert entry._cache_size() == before


@pytest.mark.parametrize("kernel", [kernels.gaussian, kernels.matern, kernels.laplace])
def test_length_scales_are_positive_numbers(kernel):
    for length_scale in (0, -1.0, np.nan, np.inf, jnp.array([1.0, 0.0]), True, 1j):
        with pytest.raises(ValueError, match=r"length_scale is .*; expected positive numbers"):
            kernel(length_scale)
    assert kernel(jnp.bfloat16(2)).length_scale == 2


@pytest.mark.parametrize("shape", [(1,), (2,), (3, 1), (50, 1), (1, 3)])
def test_length_scales_of_other_shapes_are_refused(shape):
    kernel, points = kernels.gaussian(jnp.ones(shape)), POINTS[3]
    message = r"length_scale has shape .* 3 coordinates; expected a number or \(3,\)"
    for call in (
        lambda: KernelMatrix(kernel, points),
        lambda: kernels.evaluate(kernel, points, points),
        lambda: kernel(points[0], points[1]),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_it_is_a_matrix_for_all_that_takes_products():
    a = KernelMatrix(Partial(plain), POINTS[3])
    norm = nys.linalg.spectral_norm(a)
    chex.assert_trees_all_close(norm, jnp.linalg.norm(a @ jnp.eye(50), 2), rtol=1e-4)
    assert nys.problems.Symmetric(a).shape == (50, 50)


def test_gradients_of_a_product_are_finite_where_points_are_the_same():
    x = jnp.zeros((4, 2))
    for kernel in (kernels.matern(1.0, 0.5), kernels.gaussian()):
        gradient = jax.grad(lambda x, k=kernel: jnp.sum(KernelMatrix(k, x) @ jnp.ones((4, 1))))(x)
        assert jnp.all(jnp.isfinite(gradient))


@pytest.mark.parametrize("d", POINTS)
def test_it_lowers_for_accelerators_in_full_precision(d):
    def fn(x):
        a = KernelMatrix(kernels.gaussian(), x)
        return a @ x, a.columns(jnp.arange(3)), a.diagonal()

    assert_full_precision(fn, POINTS[d])


REFUSED = {
    "kernel": (3.0, POINTS[3], "kernel is a float; expected a function of two points"),
    "vector": (kernels.gaussian(), jnp.ones(3), r"POINTS|points has shape \(3,\)"),
    "integers": (kernels.gaussian(), jnp.ones((3, 1), int), "points has dtype int32"),
    "NumPy": (lambda x, y: np.exp(x @ y), POINTS[3], "the kernel of two points fails .*Tracer"),
    "one point": (lambda x: x[0], POINTS[3], "the kernel of two points fails .TypeError"),
    "matrix": (lambda x, y: x, POINTS[3], "the kernel of two points is .*; expected a number"),
    "dtype": (lambda x, y: 1, POINTS[3], "the kernel of two points is .*; expected"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused(case):
    kernel, points, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        KernelMatrix(kernel, points)


@pytest.mark.parametrize("shape", [(), (49,), (49, 2), (2, 50, 1)])
def test_products_that_do_not_fit_are_refused(shape):
    a = KernelMatrix(kernels.gaussian(), POINTS[3])
    with pytest.raises(ValueError, match=r"x has shape .*; expected \(50,\) or \(50, k\)"):
        a @ jnp.ones(shape)


def test_an_unknown_smoothness_is_refused():
    with pytest.raises(ValueError, match=r"smoothness is 2; expected 0\.5, 1\.5 or 2\.5"):
        kernels.matern(smoothness=2)
