"""The product with the second factor, and its derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nyscaled as nys
from nyscaled.lora.contraction import Contraction
from nyscaled.lora.view import Equations

R = 2
CASES = {
    "linear": ("...r,ro->...o", (), (5,), (3, 4, R)),
    "one token": ("...r,ro->...o", (), (5,), (R,)),
    "heads": ("abr,rcd->abcd", (), (3, 2), (4, 3, R)),
    "batch of kernels": ("abr,bro->abo", (3,), (5,), (4, 3, R)),
}


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_derivatives_are_those_of_the_einsum(case):
    up, batch, outputs, shape = CASES[case]
    c = Contraction(Equations("", up), batch, (), outputs, None, "highest", None)
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], shape)
    b = jax.random.normal(keys[1], (*batch, R, np.prod(outputs)))

    def plain(hidden, b):
        return jnp.einsum(up, hidden, b.reshape(*batch, R, *outputs), precision="highest")

    weights = jax.random.normal(keys[2], plain(hidden, b).shape)

    def gradients(product, hidden, b):
        return jax.grad(lambda *x: jnp.sum(weights * product(*x) ** 2), (0, 1))(hidden, b)

    first, second = (gradients(f, hidden, b) for f in (c.up, plain))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), first, second)
    change = jax.tree.map(jnp.cos, (hidden, b))
    first, second = (jax.jvp(f, (hidden, b), change) for f in (c.up, plain))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), first, second)
    for axes in ((None, 0), (0, None), (1, 1)):
        many = [
            x if i is None else jnp.stack([x, 2 * x], i)
            for x, i in zip((hidden, b), axes, strict=True)
        ]
        first, second = (jax.vmap(f, axes)(*many) for f in (c.up, plain))
        np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-5)
    for derivative in (jax.jacrev, jax.jacfwd):  # a second derivative, both ways
        first, second = (
            derivative(lambda b, f=f: gradients(f, hidden, b)[1])(b) for f in (c.up, plain)
        )
        np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("equation", ["bij,jk->bk", "...A,AB->...B", "...B,BA->...A"])
def test_einsums_with_strange_letters_and_sums_have_gradients(equation):
    layer = nnx.Einsum(equation, (4, 6), rngs=nnx.Rngs(0))
    tree = nnx.Dict(layer=layer)
    nys.lora.apply(tree, R, targets=".*", key=jax.random.key(0))
    layer.adapters["default"].lora_b[...] += 1
    x = jax.random.normal(jax.random.key(1), (2, 3, 4))
    update = layer.adapters["default"].product()
    np.testing.assert_allclose(
        layer(x), jnp.einsum(equation, x, layer.kernel[...] + update), rtol=1e-4, atol=1e-4
    )
    gradient = nnx.grad(
        lambda tree: jnp.sum(tree.layer(x)), argnums=nnx.DiffState(0, nnx.LoRAParam)
    )
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(gradient(tree)))


def test_the_gradient_in_b_transposes_the_small_operand():
    """Products are canonical if all but the last axis of the right operand are contracted."""
    c = Contraction(Equations("", "...r,ro->...o"), (), (), (64,), None, None, None)
    hidden, b = jnp.ones((16, R)), jnp.ones((R, 64))

    def transposed(product):
        program = jax.make_jaxpr(jax.grad(lambda b: jnp.sum(jnp.sin(product(hidden, b)))))(b)
        last = [e for e in program.eqns if e.primitive.name == "dot_general"][-1]
        return last.invars[0].aval.shape

    assert transposed(c.up) == hidden.shape
    assert transposed(jnp.matmul) == (16, 64)  # what JAX's own rule gives


def test_complex_inputs_are_refused():
    layer = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    nys.lora.apply(layer, 2, targets=".*", key=jax.random.key(0))
    with pytest.raises(ValueError, match="input is complex64; expected a real one"):
        layer(jnp.ones((2, 4), complex))


def test_another_equation_than_that_of_the_adapters_is_refused():
    model = nnx.Dict(e=nnx.Einsum("btd,dnh->btnh", (4, 3, 2), rngs=nnx.Rngs(0)))
    nys.lora.apply(model, 2, targets=".*", key=jax.random.key(0))
    x = jnp.ones((2, 5, 4))
    assert jnp.array_equal(model.e(x), model.e(x, "btd, dnh -> btnh"))
    with pytest.raises(ValueError, match="equation 'btd,dnh->bnth'; expected 'btd,dnh->btnh'"):
        model.e(x, einsum_str="btd,dnh->bnth")
