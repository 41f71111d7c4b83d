"""Everything lowers for GPUs and TPUs, and its float32 products ask for full float32 there.

JAX writes programs for other platforms on a CPU. What has no form there (LAPACK's routines alone)
fails here, and so does a product that an accelerator would round to TF32 or bfloat16.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
import test_contracts
import test_contracts_steps as steps
import test_matrices
from cases import FORMS, KEY, M, N, R, normal
from flax import nnx
from lora_cases import KERNEL_INITS, apply, inputs, net
from model_cases import DECODERS, load, saved

import nyscaled as nys
from nyscaled.lora import gradient_inits

PLATFORMS = ["cuda", "rocm", "tpu"]
_PRODUCT = re.compile(r"stablehlo\.(dot_general|dot|convolution)\b.*")


def products(fn, *args):
    """The lines of the products of float32 arrays in the program for all three platforms."""
    text = jax.export.export(jax.jit(fn), platforms=PLATFORMS)(*args).mlir_module()
    lines = [line.group() for line in _PRODUCT.finditer(text)]
    # What contracts nothing, as in BCOO's products, is a multiplication, which XLA does not round.
    contracted = [line for line in lines if "contracting_dims = [] x []" not in line]
    return [line for line in contracted if "xf32>" in line.split(" : ")[-1]]


def assert_full_precision(fn, *args, some=True):
    found = products(fn, *args)
    assert found or not some
    assert not [line for line in found if line.count("HIGHEST") != 2]


def test_a_product_of_default_precision_is_seen():
    a = normal(0, (M, N))
    assert products(jnp.matmul, a.T, a)
    with pytest.raises(AssertionError):
        assert_full_precision(jnp.matmul, a.T, a)


@pytest.mark.long_beyond(3)
@pytest.mark.parametrize(("kind", "name"), steps.STEPS)
def test_steps(kind, name):
    a, problem, start = steps.instance(kind, 0)
    build = (steps.SYMMETRIC_STEPS if kind == "symmetric" else steps.ASYMMETRIC_STEPS)[name]
    assert_full_precision(lambda a, x: nys.solvers.run(build(problem(a)), x, 2), a, start)


def first(names, *short):
    """Parameters of which all but a few are long."""
    return [pytest.param(n, marks=() if n in short else pytest.mark.long) for n in names]


@pytest.mark.parametrize("form", first(FORMS, "dense"))
@pytest.mark.parametrize("door", test_matrices.MATRICES)
def test_functions_of_matrices(door, form):
    a = FORMS[form](jnp.asarray(test_matrices.PSD))
    assert_full_precision(test_matrices.MATRICES[door], a, some=form == "dense")


@pytest.mark.parametrize("door", test_matrices.DENSE_ONLY)
def test_functions_of_dense_arrays(door):
    a = jnp.asarray(test_matrices.dense(door))
    assert_full_precision(test_matrices.DENSE_ONLY[door], a, some=False)


@pytest.mark.parametrize("name", steps.INITIALIZERS)
def test_starts(name):
    assert_full_precision(lambda key: steps.INITIALIZERS[name](key, 0.5), KEY, some=False)


MEASURED = {
    "sensing": lambda: nys.problems.sensing.gaussian(KEY, 8, [1.0, 0.5], 20),
    "sensing of pairs": lambda: nys.problems.sensing.gaussian_factors(KEY, 8, 6, [1.0, 0.5], 20),
    "completion": lambda: (lambda x: (nys.problems.completion.bernoulli(KEY, x, 0.5), x))(
        normal(0, (8, 2))
    ),
    "phase": lambda: nys.problems.phase.gaussian(KEY, 8, [1.0, 0.5], 20),
    "one bit": lambda: nys.problems.onebit.gaussian(KEY, 8, [1.0, 0.5], 20),
    "robust": lambda: nys.problems.robust.corrupted(KEY, 8, 6, [1.0, 0.5], 0.1),
}


@pytest.mark.long_beyond(2)
@pytest.mark.parametrize("name", MEASURED)
def test_problems_of_measurements(name):
    problem, point = MEASURED[name]()

    def everything(problem, point):
        derivative = jax.grad(problem.loss)(point)
        return problem.loss(point), problem.gradient(point), derivative

    assert_full_precision(everything, problem, point, some=False)
    assert_full_precision(lambda p: nys.initializers.spectral(p, 2), problem, some=False)


@pytest.mark.long_beyond(3)
@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in test_contracts.TRANSFORMS for kind in test_contracts.KINDS[name]],
)
def test_transforms(name, kind):
    tx, params = test_contracts.made(name), test_contracts.PARAMS[kind]()

    def two_updates(grads, params):
        updates, state = test_contracts.update(tx, grads, tx.init(params), params)
        return updates, test_contracts.update(tx, grads, state, params)

    assert_full_precision(two_updates, test_contracts.gradients(params), params, some=False)


@pytest.mark.long_beyond(3)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", KERNEL_INITS)
def test_starts_of_adapters(name, dtype):
    init, options = nys.lora.KERNEL_INITS[name.split("_")[0]], KERNEL_INITS[name]
    kernel = normal(0, (M, N)).astype(dtype)
    fn = functools.partial(init, rank=R, scaling=2.0, **options)
    assert_full_precision(fn, KEY, kernel, some=False)


@pytest.mark.parametrize("name", gradient_inits.GRADIENT_INITS)
def test_starts_of_adapters_from_gradients(name):
    init = gradient_inits.GRADIENT_INITS[name]
    starts = {"layer": gradient_inits.FactorStacks(normal(0, (1, M, R)), normal(1, (1, R, N)))}
    gradient = functools.partial(jax.tree.map, jnp.sin)
    assert_full_precision(lambda key: init(gradient, starts, key), KEY, some=name == "lora_one")


def merged(model):
    """A model as a function of its adapters and all else."""
    graphdef, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)
    return lambda *states: nnx.merge(graphdef, *states, copy=True), adapters, rest


def loss_and_gradient(model, *inputs):
    build, adapters, rest = merged(model)

    def step(adapters, rest, *inputs):
        return jax.value_and_grad(lambda a: jnp.mean(build(a, rest)(*inputs) ** 2))(adapters)

    return step, adapters, rest, *inputs


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize("name", first(KERNEL_INITS, "nora", "pissa"))
def test_adapted_layers(name):
    model = net(precision="highest")
    apply(model, name)
    assert_full_precision(*loss_and_gradient(model, inputs()))


def test_adapters_are_in_full_precision_beside_layers_of_the_default_precision():
    model = net()
    apply(model)
    build, *states = merged(model)
    found = products(lambda a, rest, x: build(a, rest)(x), *states, inputs())
    default = [line for line in found if "HIGHEST" not in line]
    assert len(default) == len(products(lambda x: net()(x), inputs()))
    assert len(found) == 3 * len(default)


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize("name", [*DECODERS, "bert", "bert_encoder"])
def test_models_with_adapters(name):
    model, arrays = load(name), saved(name)
    nys.lora.apply(model, 2, targets=r".*(q_proj|v_proj|query|value)", key=KEY)
    assert_full_precision(*loss_and_gradient(model, arrays["tokens"], arrays["mask"]))
    if name not in DECODERS:
        return
    build, *states = merged(model)

    def decoded(adapters, rest, tokens, mask):
        model = build(adapters, rest)
        cache = model.new_cache(len(tokens), 16)
        return model.logits(model.hidden(tokens, mask, cache)[0])

    assert_full_precision(decoded, *states, arrays["tokens"], arrays["mask"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_factorize(dtype):
    assert_full_precision(
        lambda a: nys.factorize(a, 3, passes=5), normal(0, (40, 30)).astype(dtype)
    )
