"""Bad input: each is a ValueError that says what it got and what it expected."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import (
    FORMS,
    KEY,
    M,
    N,
    R,
    normal,
    operator,
    psd,
    rectangular,
    skip_without_float16,
)
from jax.experimental.sparse import BCOO

import nyscaled as nys
from nyscaled import validation
from nyscaled.solvers import Status


def raises(*words):
    """A ValueError whose message has all the words in this order."""
    return pytest.raises(ValueError, match="(?s)" + ".*".join(words))


SYMMETRIC_ENTRIES = {
    "problem": nys.problems.Symmetric,
    "nystrom": lambda a: nys.initializers.nystrom(KEY, a, 1),
    "perturbed": lambda a: nys.initializers.perturbed(KEY, a, 1),
}
ASYMMETRIC_ENTRIES = {
    "problem": nys.problems.Asymmetric,
    "nystrom": lambda a: nys.initializers.nystrom_factors(KEY, a, 1),
    "altgd": lambda a: nys.initializers.altgd(KEY, a, 1, norm=1.0),
}
ENTRIES = [
    pytest.param(fn, id=f"{kind}-{name}")
    for kind, entries in (("symmetric", SYMMETRIC_ENTRIES), ("asymmetric", ASYMMETRIC_ENTRIES))
    for name, fn in entries.items()
]


@pytest.fixture(params=SYMMETRIC_ENTRIES)
def symmetric_entry(request):
    return SYMMETRIC_ENTRIES[request.param]


# --- The matrix ----------------------------------------------------------------------------------


def test_rectangular_matrix_for_a_symmetric_problem(symmetric_entry):
    with raises(r"A has shape \(60, 40\)", "expected a square matrix"):
        symmetric_entry(rectangular()[0])


@pytest.mark.parametrize("form", FORMS)
def test_non_symmetric_matrix_in_every_form(symmetric_entry, form):
    skew = psd()[0].at[0, 1].add(0.1)
    with raises("A is not symmetric", "expected A = Aᵀ"):
        symmetric_entry(FORMS[form](skew))


def test_asymmetry_of_the_size_of_rounding_is_accepted():
    a = psd()[0]
    nys.problems.Symmetric(a.at[0, 1].multiply(1 + 1e-6))


@pytest.mark.parametrize("form", FORMS)
def test_indefinite_matrix_is_seen_by_nystrom(form):
    a, basis = psd()
    a = a - 2.0 * jnp.outer(basis[:, 0], basis[:, 0])
    with raises("A is not positive semidefinite", "expected a PSD matrix"):
        nys.initializers.nystrom(KEY, FORMS[form](a), R)


@pytest.mark.long
def test_indefinite_matrix_ends_a_run_and_never_in_silence():
    a, basis = psd()
    a = a - 2.0 * jnp.outer(basis[:, 0], basis[:, 0])
    problem = nys.problems.Symmetric(a)
    step = nys.solvers.scaled_step(problem, 0.5)
    x0 = a @ normal(0, (M, R))
    with raises("INDEFINITE", "not positive semidefinite"):
        nys.solvers.run(step, x0, 20)
    assert nys.solvers.run(step, x0, 20, throw=False).status is Status.INDEFINITE
    with raises("INDEFINITE"):
        nys.solvers.run_until(step, x0, problem.residual, 1e-6, 20)
    status = jax.jit(lambda x: nys.solvers.run(step, x, 20).status)(x0)
    assert int(status) == Status.INDEFINITE


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_matrix_with_nan_or_inf(entry, form, bad):
    with raises("A has NaN or Inf entries", "expected finite"):
        entry(FORMS[form](psd()[0].at[3, 3].set(bad)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_zero_matrix(entry, form):
    zero = jnp.zeros((M, M))
    zero = BCOO.fromdense(zero, nse=1) if form == "bcoo" else FORMS[form](zero)
    with raises(r"A is the zero matrix \(60, 60\)", "expected a non-zero one"):
        entry(zero)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.bfloat16, jnp.float16, jnp.complex64])
@pytest.mark.parametrize("entry", ENTRIES)
def test_matrix_of_another_dtype(entry, dtype):
    skip_without_float16(dtype)
    with raises(f"A has dtype {jnp.dtype(dtype).name}", "expected float32 or float64"):
        entry(jnp.eye(4).astype(dtype))


def test_integer_numpy_matrix_and_operator():
    for a in (np.eye(4, dtype=np.int64), operator(jnp.eye(4, dtype=jnp.int32))):
        with raises("A has dtype int", "expected float32 or float64"):
            nys.problems.Symmetric(a)


@pytest.mark.parametrize("shape", [(4,), (2, 4, 4), ()])
@pytest.mark.parametrize("entry", ENTRIES)
def test_array_that_is_no_matrix(entry, shape):
    with raises(r"A has shape \(", r"expected a matrix, \(m, n\)"):
        entry(jnp.ones(shape))


@pytest.mark.parametrize("thing", ["a.npy", None, object()], ids=["str", "None", "object"])
def test_thing_that_is_no_array(thing):
    with raises("A is a (str|NoneType|object)", "expected a dense array.*Operator"):
        nys.problems.Asymmetric(thing)


def test_constants_from_outside_of_jit_may_be_used_inside():
    a, b = psd()[0], jnp.ones(3)

    @jax.jit
    def everything(x):
        full = nys.problems.Symmetric(a).loss(x) + nys.problems.Asymmetric(a).a.sum()
        start = nys.initializers.nystrom(KEY, a, R)
        matrices = normal(0, (3, M, M))
        sensed = nys.problems.Sensing(matrices, b).loss(x)
        return full + sensed + nys.problems.sensing.random_factor(KEY, 4, b, 4).sum(), start

    chex.assert_tree_all_finite(everything(normal(1, (M, R))))


def test_checks_of_values_are_left_out_under_jit_and_those_of_shapes_are_not():
    loss = jax.jit(lambda a: nys.problems.Symmetric(a).loss(jnp.ones((4, 1))))
    assert jnp.isnan(loss(jnp.full((4, 4), jnp.nan)))
    with raises("expected a square matrix"):
        loss(jnp.ones((4, 5)))


# --- Ranks and factors ---------------------------------------------------------------------------

RANKED = {
    "nystrom": lambda r: nys.initializers.nystrom(KEY, psd()[0], r),
    "perturbed": lambda r: nys.initializers.perturbed(KEY, psd()[0], r),
    "small": lambda r: nys.initializers.small(KEY, M, r),
    "from_gradient": lambda r: nys.initializers.nystrom_from_gradient(
        KEY, nys.problems.Symmetric(psd()[0]).gradient, M, r
    ),
    "spectral": lambda r: nys.initializers.spectral(nys.problems.Symmetric(psd()[0]), r),
}
RANKED_PAIRS = {
    "nystrom": lambda r: nys.initializers.nystrom_factors(KEY, rectangular()[0], r),
    "small": lambda r: nys.initializers.small_factors(KEY, (M, N), r),
    "altgd": lambda r: nys.initializers.altgd(KEY, rectangular()[0], r, norm=1.0),
    "from_gradient": lambda r: nys.initializers.nystrom_factors_from_gradient(
        KEY, nys.problems.Asymmetric(rectangular()[0]).gradient, (M, N), r
    ),
    "spectral": lambda r: nys.initializers.spectral(nys.problems.Asymmetric(rectangular()[0]), r),
}


@pytest.mark.parametrize("rank", [0, -1, M + 1])
@pytest.mark.parametrize("name", RANKED)
def test_rank_out_of_range(name, rank):
    with raises(f"rank is {rank}; expected 1 ≤ rank ≤ 60"):
        RANKED[name](rank)


@pytest.mark.parametrize("rank", [0, N + 1])
@pytest.mark.parametrize("name", RANKED_PAIRS)
def test_rank_above_the_smaller_side(name, rank):
    with raises(f"rank is {rank}; expected 1 ≤ rank ≤ 40"):
        RANKED_PAIRS[name](rank)


@pytest.mark.parametrize("rank", [2.0, True, "2", None])
def test_rank_that_is_no_integer(rank):
    with raises("rank is", "expected an integer"):
        validation.require_rank(rank, (M, M))


SYMMETRIC_FACTORS = {
    "rows": (jnp.ones((N, R)), r"X has shape \(40, 4\); expected \(60, r\)"),
    "vector": (jnp.ones(M), r"X has shape \(60,\); expected \(60, r\)"),
    "empty": (jnp.ones((M, 0)), "rank is 0; expected"),
    "wide": (jnp.ones((M, M + 1)), "rank is 61; expected"),
    "integer": (jnp.ones((M, R), jnp.int32), "X has dtype int32; expected float32 or float64"),
    "bf16": (jnp.ones((M, R), jnp.bfloat16), "X has dtype bfloat16; expected float32 or float64"),
    "pair": (nys.Factors(jnp.ones((M, R)), jnp.ones((M, R))), r"expected \(60, r\)"),
    "zero": (jnp.zeros((M, R)), "the start is zero.*expected a non-zero one"),
    "nan": (jnp.full((M, R), jnp.nan), "the start has NaN or Inf entries; expected finite"),
}


def steps(problem):
    return nys.solvers.scaled_step(problem), nys.solvers.gradient_step(problem, optax.sgd(0.1))


@pytest.mark.parametrize("name", SYMMETRIC_FACTORS)
def test_bad_factor_of_a_symmetric_problem(name):
    x, message = SYMMETRIC_FACTORS[name]
    for step in steps(nys.problems.Symmetric(psd()[0])):
        with raises(message):
            nys.solvers.run(step, x, 1)
        with raises(message):
            nys.solvers.run_until(step, x, lambda x: x[0, 0], 1.0)


ASYMMETRIC_FACTORS = {
    "alone": (jnp.ones((M, R)), "expected nyscaled.Factors"),
    "left": (
        nys.Factors(jnp.ones((N, R)), jnp.ones((N, R))),
        r"left has shape.*expected \(60, r\)",
    ),
    "right": (
        nys.Factors(jnp.ones((M, R)), jnp.ones((M, R))),
        r"right has shape.*expected \(40, r\)",
    ),
    "ranks": (nys.Factors(jnp.ones((M, R)), jnp.ones((N, 2))), "expected as many columns in both"),
    "wide": (nys.Factors(jnp.ones((M, 41)), jnp.ones((N, 41))), "rank is 41; expected"),
    "integer": (
        nys.Factors(jnp.ones((M, R)), jnp.ones((N, R), jnp.int32)),
        "right has dtype int32; expected float32 or float64",
    ),
    "zero": (nys.Factors(jnp.zeros((M, R)), jnp.zeros((N, R))), "the start is zero.*non-zero"),
    "nan": (nys.Factors(jnp.ones((M, R)), jnp.full((N, R), jnp.nan)), "right has NaN or Inf"),
}


@pytest.mark.parametrize("name", ASYMMETRIC_FACTORS)
def test_bad_factors_of_an_asymmetric_problem(name):
    factors, message = ASYMMETRIC_FACTORS[name]
    for step in steps(nys.problems.Asymmetric(rectangular()[0])):
        with raises(message):
            nys.solvers.run(step, factors, 1)


# --- Step sizes and other numbers ----------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, -0.5, 1.01, float("nan"), float("inf"), 2])
def test_learning_rate_outside_of_its_interval(eta):
    problem = nys.problems.Symmetric(psd()[0])
    for build in (nys.scaled_gd, lambda eta: nys.solvers.scaled_step(problem, eta)):
        with raises(r"learning_rate is .*; expected a number in \(0, 1\]"):
            build(eta)


@pytest.mark.parametrize(
    ("eta", "shown"),
    [
        ("0.5", "'0.5'"),
        (None, "None"),
        (True, "True"),
        (1j, "complex"),
        (jnp.ones(3), r"shape \(3,\)"),
    ],
)
def test_learning_rate_that_is_not_a_number(eta, shown):
    build = inspect.unwrap(nys.scaled_gd)  # without the tests' check of annotations
    with raises(f"learning_rate is .*{shown}; expected a number"):
        build(eta)


@pytest.mark.parametrize("eta", [1, 1.0, 1e-8, jnp.float32(0.5)])
def test_learning_rates_inside_of_the_interval_are_accepted(eta):
    nys.scaled_gd(eta)
    nys.solvers.scaled_step(nys.problems.Symmetric(psd()[0]), eta)


@pytest.mark.parametrize("damping", [-0.1, float("nan"), float("inf")])
def test_negative_damping(damping):
    problem = nys.problems.Symmetric(psd()[0])
    for build in (
        nys.scale_by_gram,
        lambda d: nys.scaled_gd(0.5, d),
        lambda d: nys.solvers.scaled_step(problem, 0.5, d),
    ):
        with raises(r"damping is .*; expected a number in \[0, inf\)"):
            build(damping)


def test_damping_together_with_the_pseudo_inverse():
    with raises("damping is 0.1 with pseudo_inverse=True", "expected one or the other"):
        nys.scaled_gd(0.5, 0.1, pseudo_inverse=True)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_scale_that_is_not_positive(scale):
    for start in (nys.initializers.nystrom, nys.initializers.nystrom_factors):
        with raises(r"scale is .*; expected a number in \(0, inf\)"):
            start(KEY, psd()[0], R, scale)


def test_negative_noise_and_norm():
    with raises(r"noise is -1; expected a number in \[0, inf\)"):
        nys.initializers.perturbed(KEY, psd()[0], R, noise=-1.0)
    with raises(r"norm is 0; expected a number in \(0, inf\)"):
        nys.initializers.altgd(KEY, rectangular()[0], R, norm=0.0)


def test_counts_and_tolerances():
    step = nys.solvers.scaled_step(nys.problems.Symmetric(psd()[0]))
    x = normal(0, (M, R))
    with raises("num_steps is -1; expected an integer ≥ 0"):
        nys.solvers.run(step, x, -1)
    with raises("max_steps is -1; expected an integer ≥ 0"):
        nys.solvers.run_until(step, x, jnp.linalg.norm, 1e-3, -1)
    for tol in (-1.0, float("nan")):
        with raises(r"tol is .*; expected a number in \[0, inf\)"):
            nys.solvers.run_until(step, x, jnp.linalg.norm, tol)


@pytest.mark.parametrize(
    ("spectrum", "message"),
    [
        ([], r"spectrum has shape \(0,\); expected 1 to 5"),
        ([1.0] * 6, r"spectrum has shape \(6,\); expected 1 to 5"),
        (np.ones((1, 1)), r"spectrum has shape \(1, 1\); expected 1 to 5"),
        ([1.0, 0.0], "expected positive finite singular values"),
        ([1.0, -1.0], "expected positive finite singular values"),
        ([1.0, float("nan")], "expected positive finite singular values"),
        ([1.0, float("inf")], "expected (positive|finite)"),
    ],
)
def test_bad_spectra(spectrum, message):
    for make in (
        lambda: nys.spectra.psd(KEY, 5, spectrum),
        lambda: nys.spectra.rectangular(KEY, 5, 6, spectrum),
    ):
        with raises(message):
            make()


def test_names_that_do_not_exist():
    with raises("name is 'fig9'; expected one of fig1ab, fig1c"):
        nys.spectra.paper("fig9", KEY)


def test_rank_without_a_gap_has_no_subspace_rate():
    for rank in (0, 3):
        with raises(f"rank is {rank}; expected 1 ≤ rank < r_A = 3"):
            nys.dynamics.subspace_rate(jnp.array([3.0, 2.0, 1.0]), rank, 0.5)


@pytest.mark.parametrize("form", ["bcoo", "operator"])
def test_optimum_requires_a_dense_matrix(form):
    for problem in (
        nys.problems.Symmetric(FORMS[form](psd()[0])),
        nys.problems.Asymmetric(FORMS[form](rectangular()[0])),
    ):
        with raises("A is a (BCOO|Operator); expected a dense matrix"):
            problem.optimum(R)
