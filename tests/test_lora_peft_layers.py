"""Adapters of some layers of a stack, with ranks and scalings of their own."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from peft_cases import CONFIG, NAMES, TENSORS, Model, X, save, train

import nyscaled as nys
from nyscaled.checkpoints import peft

SIDES = {"up": (8, 12), "down": (12, 8)}


def update(module, rank, alpha=3.0):
    rows, columns = SIDES[module]
    rng = np.random.default_rng(rank)
    down, up = rng.standard_normal((rank, rows)), rng.standard_normal((columns, rank))
    return peft.Update(down.astype("f") / 3, up.astype("f") / 3, alpha)


CASES = {
    "one layer": {"layers.1.up": update("up", 2)},
    "a layer of each": {"layers.1.up": update("up", 2), "layers.0.down": update("down", 2)},
    "ranks": {"layers.0.up": update("up", 2), "layers.1.up": update("up", 5)},
    "alphas": {"layers.0.up": update("up", 2), "layers.1.up": update("up", 2, 7.0)},
    "ranks of one scaling": {"layers.0.up": update("up", 2), "layers.1.up": update("up", 4, 6.0)},
    "a negative alpha": {"layers.0.up": update("up", 1, -4.0), "layers.1.up": update("up", 3)},
    "a negative alpha and 0": {
        "layers.0.up": update("up", 1, -4.0),
        "layers.1.up": update("up", 3, 0.0),
    },
    "alpha 0": {"layers.0.up": update("up", 1, 0.0), "layers.1.up": update("up", 3, 0.0)},
}


def expected(updates, rank_stabilized):
    """The model with α/r · (up @ down)ᵀ, or α/√r, added to its kernels."""
    model = Model()
    for name, (down, up, alpha, _) in updates.items():
        _, index, module = name.split(".")
        scaling = alpha / down.shape[0] ** (0.5 if rank_stabilized else 1)
        kernel = getattr(model.layers, module).kernel
        kernel[...] = kernel[...].at[int(index)].add(scaling * (up @ down).T)
    return model(X)


@pytest.mark.long_beyond(4)
@pytest.mark.parametrize("rank_stabilized", [False, True])
@pytest.mark.parametrize("updates", CASES.values(), ids=CASES.keys())
def test_some_layers_and_ranks_of_their_own(updates, rank_stabilized, tmp_path):
    peft.write(tmp_path, updates, base_model="mine", rank_stabilized=rank_stabilized)
    model = Model()
    nys.lora.load_peft(model, tmp_path, names=NAMES)
    reference = expected(updates, rank_stabilized)
    np.testing.assert_allclose(model(X), reference, atol=1e-5)
    # Saved again, the file has the same modules with the same ranks, and the same meaning.
    save(model, tmp_path / "again")
    read = peft.read(tmp_path / "again")
    ranks = {name: u.down.shape[0] for name, u in read.updates.items()}
    assert ranks == {name: u.down.shape[0] for name, u in updates.items()}
    np.testing.assert_allclose(expected(read.updates, read.rank_stabilized), reference, atol=1e-5)
    again = Model()
    nys.lora.load_peft(again, tmp_path / "again", names=NAMES)
    np.testing.assert_allclose(again(X), reference, atol=1e-5)


def test_layers_of_one_rank_and_scaling_keep_their_bits(tmp_path):
    updates = {f"layers.{i}.up": update("up", 3 - i // 2) for i in range(2)}
    peft.write(tmp_path, updates, base_model="mine")
    model = Model()
    nys.lora.load_peft(model, tmp_path, names=NAMES)
    adapter = model.layers.up.adapters["default"]
    assert adapter.alpha == 3.0
    np.testing.assert_array_equal(adapter.lora_b[...][1], updates["layers.1.up"].up.T)


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize("tx", ["adam", "nora_plus"])
def test_what_was_filled_up_with_zeros_does_not_train(tx, tmp_path):
    import optax

    updates = {"layers.0.up": update("up", 2), "layers.0.down": update("down", 1)}
    peft.write(tmp_path, updates, base_model="mine")
    model = Model()
    nys.lora.load_peft(model, tmp_path, names=NAMES)
    inner = optax.adamw(1e-2)
    optimizer = nnx.Optimizer(
        model, nys.nora_plus(inner) if tx == "nora_plus" else inner, wrt=nnx.LoRAParam
    )
    loss = lambda m: jnp.mean((m(X) - 1) ** 2)  # noqa: E731

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(3)]
    assert losses[-1] < losses[0]
    save(model, tmp_path / "again")
    assert set(safetensors.numpy.load_file(tmp_path / "again" / TENSORS)) == set(
        safetensors.numpy.load_file(tmp_path / TENSORS)
    )


def test_layers_to_transform_says_which_are_missing(tmp_path):
    def edit(**fields):
        config = json.loads((tmp_path / CONFIG).read_text())
        (tmp_path / CONFIG).write_text(json.dumps(config | fields))

    peft.write(tmp_path, {"layers.1.up": update("up", 2)}, base_model="mine")
    edit(target_modules=["up"], layers_to_transform=[1])
    # PEFT looks for a number with two names before it, unless layers_pattern is given.
    with pytest.raises(ValueError, match="not among"):
        nys.lora.load_peft(Model(), tmp_path, names=NAMES)
    edit(layers_pattern="layers")
    nys.lora.load_peft(Model(), tmp_path, names=NAMES)
    edit(layers_to_transform=[0, 1])
    with pytest.raises(ValueError, match=r"no tensors of layers\.0\.up"):
        nys.lora.load_peft(Model(), tmp_path, names=NAMES)
    edit(layers_to_transform=None, layers_pattern=None)
    with pytest.raises(ValueError, match=r"no tensors of layers\.0\.up"):
        nys.lora.load_peft(Model(), tmp_path, names=NAMES)


def test_an_untrained_stack_is_saved_whole(tmp_path):
    model = Model()
    nys.lora.apply(model, 2, targets="layers.up", key=jax.random.key(0))
    for side in ("lora_a", "lora_b"):
        getattr(model.layers.up.adapters["default"], side)[...] *= 0
    save(model, tmp_path)
    assert set(peft.read(tmp_path).updates) == {"layers.0.up", "layers.1.up"}
    train(model)
    save(model, tmp_path)
