"""What must be equivariant in scale: steps, starts, measures and transforms, as functions of c.

Each case is a function of √c, given as an array, that returns what is compared, divided by its
power of c. It is compiled once for all c. The base matrices have entries of about 1.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cases import operator

import nyscaled as nys

M, N, R = 24, 18, 3
SPECTRUM = np.array([1.0, 0.6, 0.3])
init, solvers, optimality = nys.initializers, nys.solvers, nys.optimality


def psd(rank=R):
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((M, rank)))
    spectrum = np.geomspace(1, 0.3, rank)
    a = (basis * spectrum) @ basis.T
    return (a + a.T) / 2, basis, spectrum


def rectangular():
    rng = np.random.default_rng(1)
    return rng.standard_normal((M, R)) @ rng.standard_normal((R, N)) / 10


def normal(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape)


def array(x, root):
    """A constant in the dtype of √c."""
    return jnp.asarray(x, root.dtype)


def scaled_psd(root):
    return array(psd()[0], root) * root * root


def scaled_rectangular(root):
    return array(rectangular(), root) * root * root


def relative(problem, size):
    """What is recorded of a run: the residual and √f, relative to ‖A‖."""
    return lambda x: (problem.residual(x) / size, problem.root_loss(x) / size)


def symmetric_run(make, start=None, form=lambda a: a, steps=6, rank=R):
    """Relative errors and the final factor of a run of a symmetric step."""

    def case(root):
        problem = nys.problems.Symmetric(form(scaled_psd(root)))
        x0 = array(normal(2, (M, rank)), root) * root if start is None else start(root)
        record = relative(problem, root * root)
        solution = solvers.run(make(problem, root), x0, steps, record)
        return solution.history, solution.params / root, solution.status

    return case


def pair_run(make, sides=None, steps=6):
    """The same of an asymmetric step, from (√c X, √c Y)."""

    def case(root):
        problem = nys.problems.Asymmetric(scaled_rectangular(root))
        if sides is None:
            x, y = (array(normal(s, (side, R)), root) * root for s, side in ((3, M), (4, N)))
            start, back = nys.Factors(x, y), (root, root)
        else:
            start, back = sides(root)
        record = relative(problem, root * root)
        solution = solvers.run(make(problem, root), start, steps, record)
        x, y = solution.params
        return solution.history, x / back[0], y / back[1], solution.status

    return case


def nystrom_pair(root):
    """(AΩ, 0): X scales as A, and Y not at all."""
    start = init.nystrom_factors(jax.random.key(0), scaled_rectangular(root), R)
    return start, (root * root, 1.0)


def until(make, steps=100):
    """`run_until` to a relative error of 1e-5: status and count."""

    def case(root):
        problem = nys.problems.Symmetric(scaled_psd(root))
        x0 = init.nystrom(jax.random.key(1), problem.a, R, 3 / root)
        solution = solvers.run_until(
            make(problem, root), x0, problem.residual, 1e-5 * root * root, steps
        )
        return solution.status, solution.num_steps

    return case


def damped(problem, root):
    return solvers.scaled_step(problem, 0.5, damping=0.1 * root * root)


STEPS = {
    "scaled": symmetric_run(lambda p, r: solvers.scaled_step(p)),
    "scaled_operator": symmetric_run(lambda p, r: solvers.scaled_step(p), form=operator),
    "scaled_over": symmetric_run(
        lambda p, r: solvers.scaled_step(p),
        start=lambda r: init.nystrom(jax.random.key(1), scaled_psd(r), R + 2, 1 / r),
    ),
    "scaled_under": symmetric_run(lambda p, r: solvers.scaled_step(p), rank=2),
    "damped": symmetric_run(damped),
    "newton": symmetric_run(lambda p, r: solvers.scaled_newton_step(p)),
    "newton_optimal": symmetric_run(lambda p, r: solvers.scaled_newton_step(p, "optimal")),
    "qdwh": symmetric_run(lambda p, r: solvers.qdwh_step(p)),
    "pair": pair_run(lambda p, r: solvers.scaled_step(p)),
    "pair_damped": pair_run(damped),
    "pair_nystrom": pair_run(lambda p, r: solvers.scaled_step(p, 1.0), nystrom_pair, 3),
    "until_scaled": until(lambda p, r: solvers.scaled_step(p)),
    "until_newton": until(lambda p, r: solvers.scaled_newton_step(p)),
    "until_qdwh": until(lambda p, r: solvers.qdwh_step(p)),
}

# Their gradients have the size c^{3/2}.
GRADIENT_STEPS = {
    "gd": symmetric_run(lambda p, r: solvers.gradient_step(p, optax.sgd(0.01 / r / r))),
    "gradient_scaled": symmetric_run(lambda p, r: solvers.gradient_step(p, nys.scaled_gd(0.5))),
    "gradient_damped": symmetric_run(
        lambda p, r: solvers.gradient_step(p, nys.scaled_gd(0.5, 0.1 * r * r))
    ),
    "gradient_pseudo": symmetric_run(
        lambda p, r: solvers.gradient_step(p, nys.scaled_gd(0.5, pseudo_inverse=True)), rank=4
    ),
    "precgd": symmetric_run(lambda p, r: solvers.gradient_step(p, nys.precgd(0.5)), rank=4),
    "diverging_gd": until(lambda p, r: solvers.gradient_step(p, optax.sgd(30 / r / r))),
    "pair_gd": pair_run(lambda p, r: solvers.gradient_step(p, optax.sgd(0.02 / r / r))),
    "pair_precgd": pair_run(lambda p, r: solvers.gradient_step(p, nys.precgd(0.5))),
    "alternating": pair_run(lambda p, r: solvers.alternating_step(p, optax.sgd(0.02 / r / r))),
    "alternating_scaled": pair_run(lambda p, r: solvers.alternating_step(p, nys.scaled_gd(0.5))),
    "modified": pair_run(
        lambda p, r: solvers.modified_step(p, optax.sgd(0.02 / r / r), at=2, beta=r)
    ),
}


def sensing(root):
    rows, columns = np.divmod(np.arange(0, M * M, 2), M)
    values = array(psd()[0][rows, columns], root) * root * root
    return nys.problems.completion.observed(rows, columns, values, (M, M))


def both(factors, left, right):
    return factors.left / left, factors.right / right


STARTS = {
    "nystrom": lambda r: init.nystrom(jax.random.key(0), scaled_psd(r), R, 1 / r) / r,
    "nystrom_stiefel": lambda r: (
        init.nystrom(jax.random.key(0), scaled_psd(r), R, sketch="stiefel") / r / r
    ),
    "nystrom_factors": lambda r: both(nystrom_pair(r)[0], r * r, 1),
    "rescaled": lambda r: (
        init.rescaled(init.nystrom(jax.random.key(0), scaled_psd(r), R), scaled_psd(r)) / r
    ),
    "rescaled_sensing": lambda r: init.rescaled(array(normal(5, (M, R)), r), sensing(r)) / r,
    "approximation": lambda r: (
        jnp.abs(init.nystrom_approximation(jax.random.key(0), scaled_psd(r), R)) / r
    ),
    "spectral": lambda r: jnp.abs(init.spectral(nys.problems.Symmetric(scaled_psd(r)), R)) / r,
    "spectral_operator": lambda r: (
        jnp.abs(init.spectral(nys.problems.Symmetric(operator(scaled_psd(r))), R)) / r
    ),
    "spectral_pair": lambda r: jax.tree.map(
        lambda f: jnp.abs(f) / r, init.spectral(nys.problems.Asymmetric(scaled_rectangular(r)), R)
    ),
    "spectral_sensing": lambda r: jnp.abs(init.spectral(sensing(r), R, symmetric=True)) / r,
    "from_gradient": lambda r: (
        init.nystrom_from_gradient(
            jax.random.key(0),
            nys.problems.Symmetric(scaled_psd(r)).gradient,
            M,
            R,
            1 / r,
            dtype=r.dtype,
        )
        / r
    ),
    "factors_from_gradient": lambda r: both(
        init.nystrom_factors_from_gradient(
            jax.random.key(0),
            nys.problems.Asymmetric(scaled_rectangular(r)).gradient,
            (M, N),
            R,
            dtype=r.dtype,
        ),
        r * r,
        1,
    ),
    "perturbed": lambda r: (
        init.perturbed(jax.random.key(0), scaled_psd(r), R, 1 / r, noise=1e-3 * r) / r
    ),
    "altgd": lambda r: both(
        init.altgd(jax.random.key(0), scaled_rectangular(r), R, 2 * r * r), r, r
    ),
}


def near(root, size=0.1):
    """A factor near the optimum, in units of √c."""
    _, basis, spectrum = psd()
    x = basis * np.sqrt(spectrum) + size * normal(6, (M, R)) / 10
    return array(x, root) * root


def frame(root):
    _, basis, spectrum = psd()
    return array(basis, root), array(spectrum, root) * root * root


MEASURES = {
    "residual": lambda r: nys.problems.Symmetric(scaled_psd(r)).residual(near(r)) / r / r,
    "residual_operator": lambda r: (
        nys.problems.Symmetric(operator(scaled_psd(r))).residual(near(r)) / r / r
    ),
    # At the level of rounding, beside what it is compared with: ‖A‖.
    "residual_of_rounding": lambda r: (
        nys.problems.Symmetric(scaled_psd(r)).residual(near(r, 0.0)) / r / r + 1
    ),
    "root_sensing": lambda r: sensing(r).root_loss(near(r)) / r / r,
    "in_basis": lambda r: optimality.residual_in_basis(near(r), *frame(r)) / r / r,
    "weak": lambda r: optimality.weak_optimality(near(r), *frame(r)),
    "weak_pair": lambda r: optimality.generalized_weak_optimality(
        nys.Factors(near(r), near(r)), frame(r)[0], *frame(r)
    ),
    "space": lambda r: optimality.residual_space(near(r), frame(r)[0]) / r,
    "angles": lambda r: optimality.principal_angles(near(r), frame(r)[0]),
    "distance": lambda r: optimality.distance(near(r), near(r, 0.0)) / r,
    "spectral_norm": lambda r: nys.linalg.spectral_norm(scaled_rectangular(r)) / r / r,
    "dual": lambda r: nys.linalg.dual(near(r)) * r,
    "pinv": lambda r: nys.linalg.pinv(near(r)) * r,
    "compress": lambda r: nys.linalg.compress(near(r)).rank,
    "exact_curve": lambda r: (
        nys.dynamics.symmetric_errors(
            frame(r)[0].T @ near(r, 3.0), frame(r)[1], jnp.asarray(0.5, r.dtype), 5
        )
        / r
        / r
    ),
}


def update(make, damping=False):
    """The update of a transform at factors of size √c, with gradients of that size."""

    def case(root):
        x, y = (array(normal(s, (side, R)), root) * root for s, side in ((7, M), (8, N)))
        g, h = (array(normal(s, (side, R)), root) for s, side in ((9, M), (10, N)))
        tx = make(root * root) if damping else make()
        params = nys.Factors(x, y)
        # The second update: the first is exempt in `nora_plus`.
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(nys.Factors(g, h), state, params)
        return updates

    return case


def times(case, power):
    """The updates of a case times √c^power, in steps that stay in range."""

    def scaled(root):
        updates = case(root)
        for _ in range(power):
            updates = jax.tree.map(lambda u: u * root, updates)
        return updates

    return scaled


sgd = optax.sgd(0.5)
TRANSFORMS = {
    "scale_by_gram": times(update(lambda: nys.scale_by_gram()), 2),
    "pseudo_inverse": times(update(lambda: nys.scale_by_gram_pinv()), 2),
    "scaled_gd_damped": times(update(lambda c: nys.scaled_gd(0.5, 0.1 * c), True), 2),
    "lora_p": times(update(lambda c: nys.lora_p(sgd, 0.1 * c), True), 2),
    "nora_plus": update(lambda c: nys.nora_plus(sgd, 0.1 * c), True),
    "lora_rite": times(update(lambda: nys.lora_rite(0.5)), 1),
    "reflora": update(lambda: nys.reflora(sgd, warmup_steps=0)),
    "reflora_s": update(lambda: nys.reflora_s(sgd, warmup_steps=0)),
}
