"""Start qwix's adapters of a Flax Linen model, over an int8 base, from NoRA."""

# region linen
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import qwix
from flax.traverse_util import flatten_dict, unflatten_dict

import nyscaled as nys

key = jax.random.key(0)
x, y = jax.random.normal(key, (32, 16)), jnp.ones((32, 4))
net = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(4)])
provider = qwix.LoraProvider(module_path=".*", rank=4, alpha=8.0, weight_qtype="int8")
net = qwix.apply_lora_to_model(net, provider)
variables = nys.lora.initialize_params(net.init(key, x), "nora", key=key, alpha=8.0)
leaves = flatten_dict(variables)
adapters = unflatten_dict({k: v for k, v in leaves.items() if "_lora_" in k[-1]})
tx = nys.nora_plus(optax.adamw(1e-2))
state = tx.init(adapters)


@jax.jit
def linen_step(adapters, state, leaves, x, y):
    def loss(adapters):
        return jnp.mean((net.apply(unflatten_dict(leaves | flatten_dict(adapters)), x) - y) ** 2)

    value, grads = jax.value_and_grad(loss)(adapters)
    updates, state = tx.update(grads, state, adapters)
    return optax.apply_updates(adapters, updates), state, value


for _ in range(3):
    adapters, state, value = linen_step(adapters, state, leaves, x, y)
    print(float(value))
# endregion linen
