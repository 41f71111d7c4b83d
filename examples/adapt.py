"""Adapt a Flax NNX model with NoRA and NoRA+, save it for PEFT, serve two adapters, and merge."""

# region adapt
import tempfile

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import nyscaled as nys

key = jax.random.key(0)
model = nnx.Sequential(
    nnx.Linear(16, 64, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(64, 4, rngs=nnx.Rngs(1))
)
x, y = jax.random.normal(key, (32, 16)), jnp.ones((32, 4))
nys.lora.apply(model, rank=4, alpha=8, targets=r"layers\.\d+", init="nora", scale=0.1, key=key)
tx = nys.nora_plus(optax.adamw(1e-2))
optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)


def mse(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


@nnx.jit
def adapt_step(model, optimizer, x, y):
    value, grads = nnx.value_and_grad(mse, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, x, y)
    optimizer.update(model, grads)
    return value


print([round(float(adapt_step(model, optimizer, x, y)), 3) for _ in range(3)])
# endregion adapt

# region fast
graphdef, adapters, base = nnx.split(model, nnx.LoRAParam, ...)
state = tx.init(adapters)


@jax.jit
def fast_step(adapters, state, base, x, y):
    def loss(adapters):
        return mse(nnx.merge(graphdef, adapters, base, copy=True), x, y)

    value, grads = jax.value_and_grad(loss)(adapters)
    updates, state = tx.update(grads, state, adapters)
    return optax.apply_updates(adapters, updates), state, value


for _ in range(3):
    adapters, state, value = fast_step(adapters, state, base, x, y)
nnx.update(model, adapters)
print(float(value))
# endregion fast

# region serve
folder = tempfile.mkdtemp()
nys.lora.save_peft(model, folder, base_model="my-model")
nys.lora.load_peft(model, folder, name="reloaded")
nys.lora.activate(model, rows=["default", "reloaded", None, None])  # None: the base only
four = model(x[:4])
nys.lora.remove(model, "reloaded")
nys.lora.activate(model, "default")
nys.lora.merge(model)  # into the kernels; unmerge takes it out, remove makes it final
print(float(jnp.abs(four[0] - model(x[:4])[0]).max()) < 1e-4)
# endregion serve
