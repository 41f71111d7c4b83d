"""Factorize a matrix by rank and by tolerance, and know the error without the matrix."""

# region rank
import jax
import jax.numpy as jnp

import nyscaled as nys

key = jax.random.key(0)
a, *_ = nys.spectra.rectangular(key, 600, 400, 1 / jnp.arange(1, 401))  # σ_i = 1/i

f = nys.factorize(a, rank=20, key=key)
print(f.left.shape, f.singular_values.shape, f.right.shape)
print(float(f.error_estimate), float(jnp.linalg.norm(a - f.left * f.singular_values @ f.right.T)))
# endregion rank

# region tol
g = nys.factorize(a, tol=0.1, key=key)  # ‖A − Â‖_F ≤ 0.1 ‖A‖_F
print(len(g.singular_values), float(g.relative_error), g.status.name)
# endregion tol

# region gradient
nuclear = jax.grad(lambda a: nys.factorize(a, rank=5).singular_values.sum())(a)
print(float(jnp.linalg.norm(nuclear)))  # √5
# endregion gradient


# region stream
def rows():
    """The same matrix, 100 rows at a time, from anywhere."""
    for start in range(0, 600, 100):
        yield jax.device_get(a[start : start + 100])


stream = nys.lowrank.RowBlocks(rows, shape=(600, 400), dtype="float32")
h = nys.factorize(stream, rank=20, passes=3)  # reads all rows three times
print(float(h.error_estimate))
# endregion stream
