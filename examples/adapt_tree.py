"""Adapt a plain tree of arrays: pairs are found by their names."""

# region tree
import jax
import jax.numpy as jnp
import optax

import nyscaled as nys

key = jax.random.key(0)
x, y = jax.random.normal(key, (32, 16)), jnp.ones((32, 4))
params = {
    "lora_a": jnp.zeros((16, 4)),
    "lora_b": jnp.zeros((4, 4)),
    "kernel": jax.random.normal(key, (16, 4)),
}
params = nys.lora.initialize_params(params, "nora", key=key)
frozen = params.pop("kernel")
tx = nys.lora_p(optax.sgd(1e-2), damping=1e-2)
state = tx.init(params)


def loss(params):
    return jnp.mean((x @ (frozen + params["lora_a"] @ params["lora_b"]) - y) ** 2)


for _ in range(3):
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    print(float(value))
# endregion tree
