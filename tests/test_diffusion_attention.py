"""Attention by parts is attention."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_cases import close

from nyscaled.diffusion.attention import attend
from nyscaled.models import blocks


@pytest.mark.parametrize(("length", "slots", "part"), [(12, 12, 40), (7, 5, 10), (8, 3, 10**6)])
def test_parts_and_their_derivatives_are_those_of_the_whole(length, slots, part):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (2, length, 3, 4), (2, slots, 3, 4), (2, slots, 3, 4)
    inputs = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]

    def loss(whole, *inputs):
        out = blocks.attend(*inputs, None, causal=False) if whole else attend(*inputs, part=part)
        return jnp.sum(out**3), out

    runs = [
        jax.jit(jax.value_and_grad(loss, (1, 2, 3), has_aux=True), static_argnums=0)(whole, *inputs)
        for whole in (True, False)
    ]
    (expected, actual) = (jax.tree.leaves(run) for run in runs)
    for one, two in zip(actual, expected, strict=True):
        close(one, two, 1e-5)


def test_other_derivatives_of_parts():
    """Forward mode, a derivative of the derivative, and both for a batch of queries by vmap."""
    keys = jax.random.split(jax.random.key(0), 6)
    inputs = [jax.random.normal(key, (1, 8, 2, 4)) for key in keys[:3]]
    tangents = [jax.random.normal(key, (1, 8, 2, 4)) for key in keys[3:]]

    def derivatives(attend):
        def of(query, tangent):
            primals, changes = (query, *inputs[1:]), (tangent, *tangents[1:])
            gradient = jax.grad(lambda *x: jnp.sum(attend(*x) ** 3), (0, 1, 2))
            return jax.jvp(attend, primals, changes), jax.jvp(gradient, primals, changes)

        stacks = (jnp.stack([x, 2 * x]) for x in (inputs[0], tangents[0]))
        return jax.tree.leaves(jax.jit(jax.vmap(of))(*stacks))

    expected = derivatives(lambda *x: blocks.attend(*x, None, causal=False))
    for one, two in zip(derivatives(lambda *x: attend(*x, part=32)), expected, strict=True):
        close(one, two, 1e-5)


def test_no_derivative_sums_over_the_first_axis_of_its_weights():
    """Such a product takes a CPU ten times as long as its transpose."""
    query = jnp.ones((1, 64, 2, 4))
    loss = lambda *x: jnp.sum(attend(*x, part=2**12) ** 2)  # noqa: E731
    program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(query, query, query).compile().as_text()
    if jax.default_backend() == "cpu":
        assert "f32[4,64]{1,0} dot(" in program
        assert not re.findall(r"= f32\[64,4\]\S* dot\(.*lhs_contracting_dims=\{0\}", program)


def test_few_logits_are_held_at_a_time():
    """The largest array of the compiled loop is a part, not the whole."""
    query, key = jnp.ones((1, 64, 2, 4)), jnp.ones((1, 64, 2, 4))
    compiled = jax.jit(lambda q, k: attend(q, k, k, part=256)).lower(query, key).compile()
    if jax.default_backend() == "cpu":
        assert compiled.memory_analysis().temp_size_in_bytes < 64 * 64 * 2 * 4
    out = attend(
        query.astype(jnp.bfloat16), key.astype(jnp.bfloat16), key.astype(jnp.bfloat16), part=256
    )
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), 1, rtol=0.02)
