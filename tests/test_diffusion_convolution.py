"""The convolution of U-Nets against JAX's own, with all its derivatives."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nyscaled.diffusion.convolution import ORDER, convolve

CASES = {
    "around": (3, (1, 1), ((1, 1), (1, 1))),
    "pixel": (1, (1, 1), ((0, 0), (0, 0))),
    "halving": (3, (2, 2), ((1, 1), (1, 1))),
    "halving, right and below": (3, (2, 2), ((0, 1), (0, 1))),
    "uneven": (3, (1, 1), ((2, 0), (0, 1))),
    "small": (3, (1, 1), ((1, 1), (1, 1)), 2, 2),
    "small and uneven": (2, (1, 1), ((1, 0), (3, 0)), 2, 1),
}


def expected(x, kernel, strides, pads):
    return jax.lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=ORDER)


@pytest.fixture(params=CASES)
def pair(request):
    window, strides, pads, *size = CASES[request.param]
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (2, *(size or (7, 6)), 3))
    kernel = jax.random.normal(keys[1], (window, window, 3, 5))
    options = {"strides": strides, "pads": pads}
    ours = functools.partial(convolve, strides=strides, padding=pads)
    return x, kernel, ours, functools.partial(expected, **options)


def same(first, second):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4), first, second)


def test_value_and_derivatives(pair):
    x, kernel, ours, theirs = pair
    same(ours(x, kernel), theirs(x, kernel))
    results = []
    for fn in (ours, theirs):
        loss = lambda x, kernel, fn=fn: jnp.sum(jnp.sin(fn(x, kernel)))  # noqa: E731
        gradient = jax.grad(loss, (0, 1))
        tangent = jax.jvp(fn, (x, kernel), (jnp.cos(x), jnp.cos(kernel)))
        second = jax.jvp(gradient, (x, kernel), (jnp.cos(x), jnp.cos(kernel)))
        results.append((gradient(x, kernel), tangent, second))
    same(*results)


def test_gradient_of_the_gradient(pair):
    x, kernel, ours, theirs = pair
    results = []
    for fn in (ours, theirs):
        loss = lambda x, kernel, fn=fn: jnp.sum(jnp.sin(fn(x, kernel)))  # noqa: E731
        norm = lambda x, kernel, loss=loss: sum(  # noqa: E731
            jnp.sum(g**2) for g in jax.grad(loss, (0, 1))(x, kernel)
        )
        results.append(jax.grad(norm, (0, 1))(x, kernel))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-2), *results)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (2, None)])
def test_under_vmap(pair, axes):
    x, kernel, ours, theirs = pair
    xs = x if axes[0] is None else jnp.stack([x, 2 * x, 3 * x], axes[0])
    kernels = kernel if axes[1] is None else jnp.stack([kernel, -kernel, jnp.cos(kernel)])
    results = []
    for fn in (ours, theirs):
        loss = lambda x, kernel, fn=fn: jnp.sum(jnp.sin(fn(x, kernel)))  # noqa: E731
        results.append(
            (jax.vmap(fn, axes)(xs, kernels), jax.vmap(jax.grad(loss, (0, 1)), axes)(xs, kernels))
        )
    same(*results)


def test_small_images_leave_kernels_as_they_are():
    """A kernel that is larger than the image is not turned on a CPU, which takes longest."""
    x, kernel = jnp.ones((1, 4, 4, 32)), jnp.ones((3, 3, 32, 32))
    fn = functools.partial(convolve, strides=(1, 1), padding=((1, 1), (1, 1)))
    gradient = jax.jit(jax.grad(lambda x, kernel: jnp.sum(jnp.sin(fn(x, kernel)))))
    traced = gradient.trace(x, kernel)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("convolution(") == 2
    on_cpu = traced.lower(lowering_platforms=("cpu",))
    assert on_cpu.as_text().count("convolution(") == 1
    if jax.default_backend() == "cpu":
        turned = re.findall(r"f32\[[\d,]+\]\S* (?:transpose|copy)\(.*", on_cpu.compile().as_text())
        assert not any("288" in each or "3,3,32,32" in each for each in turned)


def test_gradient_is_no_convolution_with_a_transposed_kernel():
    """Kernels with the channels that go out before those that come in are slow in loops on CPUs."""
    x, kernel = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4, 8))
    pads = ((1, 1), (1, 1))

    def program(fn):
        return jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(fn(x, kernel))))).lower(x).as_text()

    ours = program(functools.partial(convolve, strides=(1, 1), padding=pads))
    theirs = program(functools.partial(expected, strides=(1, 1), pads=pads))
    assert "x[0, 1, o, i]->" in theirs
    assert "x[0, 1, o, i]->" not in ours
    assert "optimization_barrier" in ours  # else XLA would fold the transposition into it again
