"""A small NNX model with every kind of layer that carries adapters, and how it is trained."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import nyscaled as nys

KEY = jax.random.key(0)
WIDTH, HEADS, LAYERS, ROWS = 8, 2, 3, 4
M, N, R = 24, 16, 4
"""Sides and rank of a single kernel."""
KERNEL_INITS = {
    "lora": {},
    "lora_gaussian": {"distribution": "gaussian"},
    "nora": {"scale": 0.3},
    "nora_stiefel": {"sketch": "stiefel"},
    "nora_output": {"side": "output"},
    "pissa": {},
    "pissa_niter": {"niter": 4},
    "milora": {},
    "olora": {},
    "orthogonal": {},
}


def kernel(dtype=jnp.float32, m=M, n=N):
    """Of decaying singular values, so that leading subspaces are distinct."""
    return nys.spectra.rectangular(KEY, m, n, jnp.geomspace(1, 1e-3, min(m, n)))[0].astype(dtype)


class Block(nnx.Module):
    """Linear, Einsum (d, n, h) and LinearGeneral (n, h) → d."""

    def __init__(self, rngs, **kwargs):
        head = WIDTH // HEADS
        self.up = nnx.Linear(WIDTH, WIDTH, rngs=rngs, **kwargs)
        self.query = nnx.Einsum("btd,dnh->btnh", (WIDTH, HEADS, head), rngs=rngs, **kwargs)
        self.out = nnx.LinearGeneral((HEADS, head), WIDTH, axis=(-2, -1), rngs=rngs, **kwargs)

    def __call__(self, x):
        return x + self.out(self.query(jnp.tanh(self.up(x))))


class Net(nnx.Module):
    """A list of blocks, then a stack of blocks under nnx.scan."""

    def __init__(self, rngs, **kwargs):
        self.blocks = nnx.List([Block(rngs, **kwargs)])

        @nnx.vmap(in_axes=0, out_axes=0)
        def make(keys):
            return Block(nnx.Rngs(keys), **kwargs)

        self.layers = make(jax.random.split(rngs.params(), LAYERS))

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            return layer(x)

        return run(self.blocks[0](x), self.layers)


@functools.cache
def _net(**kwargs):
    return Net(nnx.Rngs(0), **kwargs)


def net(**kwargs):
    """A fresh copy of the same net."""
    return nnx.clone(_net(**kwargs))


def inputs(seed=5):
    return jax.random.normal(jax.random.key(seed), (ROWS, 3, WIDTH))


def call(model, x=None):
    """The output, compiled, so that two calls are compared program by program."""
    return _call(model, inputs() if x is None else x)


@nnx.jit
def _call(model, x):
    return model(x)


def apply(model, init="nora", rank=2, targets=".*", **kwargs):
    """`nys.lora.apply` by a name of KERNEL_INITS."""
    options = KERNEL_INITS[init] | kwargs
    return nys.lora.apply(
        model,
        rank,
        targets=targets,
        key=options.pop("key", KEY),
        init=init.split("_")[0],
        **options,
    )


def square(model, x):
    return jnp.mean((model(x) - 1) ** 2)


@functools.partial(nnx.jit, static_argnames="wrt")
def train_step(model, optimizer, x, wrt=nnx.LoRAParam):
    loss, grads = nnx.value_and_grad(square, argnums=nnx.DiffState(0, wrt))(model, x)
    optimizer.update(model, grads)
    return loss


def train(model, steps=3, tx=None, wrt=nnx.LoRAParam):
    """The losses of a few steps."""
    optimizer = nnx.Optimizer(model, tx or optax.adam(1e-2), wrt=wrt)
    return [float(train_step(model, optimizer, inputs(), wrt)) for _ in range(steps)]


def base_of(model):
    """Every variable that is not an adapter's, as numpy arrays."""
    flat = nnx.to_flat_state(nnx.state(model))
    return {p: jax.device_get(v[...]) for p, v in flat if "adapters" not in p}


def assert_base_is(model, base):
    """The base of a model is, to the last bit, what `base_of` has returned."""
    for path, value in base_of(model).items():
        np.testing.assert_array_equal(value, base[path])
