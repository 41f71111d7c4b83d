"""Use ScaledGD as an optax transform, where only gradients are known."""

# region train
import jax
import jax.numpy as jnp
import optax

import nyscaled as nys

key = jax.random.key(0)
target = nys.spectra.rectangular(key, 60, 40, [1.0, 0.5, 0.2])[0]


def loss(params):
    return 0.5 * jnp.sum((params.left @ params.right.T - target) ** 2)


params = nys.initializers.nystrom_factors(key, target, rank=3)
tx = nys.scaled_gd(learning_rate=0.5)
state = tx.init(params)


@jax.jit
def train_step(params, state):
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value


for _ in range(8):
    params, state, value = train_step(params, state)
print(float(value))
# endregion train
