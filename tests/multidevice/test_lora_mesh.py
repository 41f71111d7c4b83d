"""Adapters over a base that is sharded by fsdp and tensor axes: the losses of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.sharding import PartitionSpec as P
from lora_cases import Net, inputs, square

import nyscaled as nys

KERNELS = {
    "up": P("fsdp", "tensor"),
    "query": P("fsdp", "tensor", None),
    "out": P("tensor", None, "fsdp"),
}


def mesh():
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def build(sharded):
    """The net; its kernels placed on the mesh, a stack's layers not split."""
    model = Net(nnx.Rngs(0))
    if sharded:
        for block, lead in ((model.blocks[0], ()), (model.layers, (None,))):
            for name, spec in KERNELS.items():
                kernel = getattr(block, name).kernel
                place = NamedSharding(mesh(), PartitionSpec(*lead, *spec))
                kernel[...] = jax.device_put(kernel[...], place)
    return model


def losses(model, tx, x, steps=4):
    graphdef, params, rest = nnx.split(model, nnx.LoRAParam, ...)

    @jax.jit
    def step(params, state, rest, x):
        def loss(p):
            return square(nnx.merge(graphdef, p, rest, copy=True), x)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, values = tx.init(params), []
    for _ in range(steps):
        params, state, value = step(params, state, rest, x)
        values.append(float(value))
    return values, params


@pytest.mark.parametrize(
    ("init", "tx"), [("nora", "nora_plus"), ("pissa", "reflora"), ("lora", "lora_rite")]
)
def test_losses_are_those_of_one_device(init, tx):
    make = {
        "nora_plus": lambda: nys.nora_plus(optax.adamw(1e-2)),
        "reflora": lambda: nys.reflora(optax.adamw(1e-2), warmup_steps=2),
        "lora_rite": lambda: nys.lora_rite(1e-2),
    }[tx]
    options = {"pissa": {"niter": 2}, "nora": {"scale": 0.3}, "lora": {}}[init]
    found = {}
    for sharded in (False, True):
        model = build(sharded)
        nys.lora.apply(model, 2, 4, targets=".*", init=init, key=jax.random.key(1), **options)
        x = inputs()
        if sharded:
            x = jax.device_put(x, NamedSharding(mesh(), P("fsdp")))
        found[sharded], params = losses(model, make(), x)
        if sharded:
            a = params["blocks"][0]["up"]["adapters"]["default"]["lora_a"][...]
            assert not a.sharding.is_fully_replicated
    assert found[False][-1] < found[False][0]
    np.testing.assert_allclose(found[True], found[False], rtol=1e-5)


def test_factors_lie_as_their_kernel_does():
    model = build(sharded=True)
    nys.lora.apply(model, 2, targets=".*", key=jax.random.key(1))
    expected = {
        "up": (P("fsdp", None), P(None, "tensor")),
        "query": (P("fsdp", None), P(None, "tensor")),
        "out": (P("tensor", None), P(None, "fsdp")),
    }
    for block, lead in ((model.blocks[0], ()), (model.layers, (None,))):
        for name, specs in expected.items():
            adapter = getattr(block, name).adapters["default"]
            for factor, spec in zip((adapter.lora_a, adapter.lora_b), specs, strict=True):
                place = NamedSharding(mesh(), PartitionSpec(*lead, *spec))
                assert factor[...].sharding.is_equivalent_to(place, factor.ndim)
    nys.lora.merge(model)
    assert not model.blocks[0].up.kernel[...].sharding.is_fully_replicated


def test_axis_names_in_metadata_are_carried_over():
    init = nnx.with_partitioning(nnx.initializers.normal(), ("fsdp", "tensor"))
    with jax.set_mesh(mesh()):
        model = nnx.Sequential(nnx.Linear(8, 8, kernel_init=init, rngs=nnx.Rngs(0)))
        nys.lora.apply(model, 2, targets=".*", key=jax.random.key(1))
    adapter = model.layers[0].adapters["default"]
    assert adapter.lora_a.get_metadata()["out_sharding"] == ("fsdp", None)
    assert adapter.lora_b.get_metadata()["out_sharding"] == (None, "tensor")
    specs = nnx.get_partition_spec(nnx.state(model, nnx.LoRAParam))
    leaf = specs["layers"][0]["adapters"]["default"]["lora_a"]
    assert getattr(leaf, "get_value", lambda: leaf)() == P("fsdp", None)


def test_same_start_on_the_mesh_as_on_one_device():
    starts = []
    for sharded in (False, True):
        model = build(sharded)
        nys.lora.apply(model, 2, targets=".*", key=jax.random.key(1))
        starts.append(jax.device_get(nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *starts)
    assert jnp.any(starts[0]["layers"]["up"]["adapters"]["default"]["lora_a"])


@pytest.mark.parametrize("init", ["nora_grad", "eva"])
def test_starts_from_batches_are_those_of_one_device_and_lie_as_before(init):
    starts = []
    for sharded in (False, True):
        model = build(sharded)
        nys.lora.apply(model, 2, targets=".*", key=jax.random.key(1))
        a = model.layers.up.adapters["default"].lora_a
        place = a[...].sharding
        batches = [inputs() * jnp.geomspace(1, 9, 8)]
        nys.lora.initialize(model, init, key=jax.random.key(2), loss=square, batches=batches)
        assert a[...].sharding.is_equivalent_to(place, 3)
        starts.append(np.asarray(a[...] @ a[...].mT))
    np.testing.assert_allclose(*starts, rtol=1e-3, atol=1e-4)
