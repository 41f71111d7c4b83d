"""Factorize a positive semidefinite matrix with ScaledGD, and predict the whole error curve."""

# region solve
import jax
import jax.numpy as jnp

import nyscaled as nys

key = jax.random.key(0)
a, basis = nys.spectra.paper("fig1ab", key, m=300)  # or any PSD matrix

problem = nys.problems.Symmetric(a)  # min ¼‖XXᵀ − A‖²
x0 = nys.initializers.nystrom(key, a, rank=20, scale=0.1)
step = nys.solvers.scaled_step(problem, learning_rate=0.5)
solution = nys.solvers.run_until(step, x0, measure=problem.residual, tol=1e-5)
print(solution.status.name, int(solution.num_steps), float(solution.value))
# endregion solve

# region predict
spectrum = jnp.asarray(nys.spectra.paper_spectrum("fig1ab"))
predicted = nys.dynamics.symmetric_errors(basis.T @ x0, spectrum, learning_rate=0.5, num_steps=12)
measured = nys.solvers.run(step, x0, num_steps=12, record=problem.residual).history
print(float(jnp.max(jnp.abs(measured - predicted) / predicted[0])))
# endregion predict

# region pair
target, *_ = nys.spectra.rectangular(key, 60, 40, [1.0, 0.5, 0.2])
pair = nys.problems.Asymmetric(target)  # min ½‖XYᵀ − A‖²
start = nys.initializers.nystrom_factors(key, target, rank=3)  # X₀ = AΩ, Y₀ = 0
one_step = nys.solvers.scaled_step(pair, learning_rate=1.0)
factors = nys.solvers.run(one_step, start, num_steps=1).params
print(float(pair.residual(factors)))
# endregion pair
