"""Adapters against Hugging Face's PEFT: written here and read there, and the other way round."""

import copy
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every model here is made from its configuration

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import safetensors.numpy  # noqa: E402
from flax import nnx  # noqa: E402
from peft_helpers import TENSORS, randomize, strictly  # noqa: E402

import nyscaled as nys  # noqa: E402

KEY = jax.random.key(0)
WIDTH, HEADS = 16, 4
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
X = np.random.default_rng(0).standard_normal((3, 5, WIDTH)).astype(np.float32)


class Attention(nnx.Module):
    def __init__(self, rngs):
        for name in PROJECTIONS[:3]:
            setattr(self, name, nnx.LinearGeneral(WIDTH, (HEADS, WIDTH // HEADS), rngs=rngs))
        shape = (HEADS, WIDTH // HEADS, WIDTH)
        self.out_proj = nnx.Einsum("bthd,hde->bte", shape, (WIDTH,), rngs=rngs)

    def __call__(self, x):
        scores = jnp.einsum("bshd,bthd->bhst", self.q_proj(x), self.k_proj(x))
        return x + self.out_proj(
            jnp.einsum("bhst,bthd->bshd", jax.nn.softmax(scores), self.v_proj(x))
        )


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([Attention(rngs), Attention(rngs)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class TorchAttention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name in PROJECTIONS:
            setattr(self, name, torch.nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        q, k, v = (
            getattr(self, name)(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for name in PROJECTIONS[:3]
        )
        mixed = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        return x + self.out_proj(mixed.transpose(1, 2).flatten(-2))


class TorchNet(torch.nn.Module):
    """The same function as `Net`, with the same weights."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([TorchAttention(), TorchAttention()])
        for theirs, ours in zip(self.layers, Net().layers, strict=True):
            for name in PROJECTIONS:
                layer, target = getattr(ours, name), getattr(theirs, name)
                kernel = np.array(layer.kernel[...]).reshape(WIDTH, WIDTH)
                target.weight.data = torch.tensor(kernel.T)
                target.bias.data = torch.tensor(np.array(layer.bias[...]).reshape(WIDTH))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@nnx.jit
def ours(model):
    return model(jnp.asarray(X))


def theirs(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(X)).numpy()


def train(model, name="default", steps=4):
    nys.lora.activate(model, name)
    optimizer = nnx.Optimizer(model, optax.adam(0.02), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.mean((model(jnp.asarray(X)) - X[:, ::-1]) ** 2)

        optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model))

    for _ in range(steps):
        step(model, optimizer)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"init": "nora"},
        {"init": "lora", "rank_stabilized": True},
        {"init": "pissa", "rank_stabilized": True},
        {"init": "milora"},
        {"targets": {r".*q_proj": 4, r".*0\.v_proj": 2, r".*out_proj": 3}, "alpha": 5.0},
    ],
    ids=["nora", "lora-rslora", "pissa", "milora", "ranks"],
)
def test_peft_computes_what_was_saved(options, tmp_path):
    base, model = TorchNet(), Net()
    close(theirs(base), ours(model))
    nys.lora.apply(model, 3, **({"targets": ".*", "alpha": 6.0, "key": KEY} | options))
    train(model)
    nys.lora.save_peft(model, tmp_path, base_model="net")
    loaded = strictly(peft.PeftModel.from_pretrained, copy.deepcopy(base), tmp_path)
    expected = ours(model)
    assert np.abs(expected - theirs(base)).max() > 1e-2
    close(theirs(loaded), expected)
    with loaded.disable_adapter():
        np.testing.assert_array_equal(theirs(loaded), theirs(base))
    nys.lora.activate(model, ())
    np.testing.assert_array_equal(ours(model), ours(Net()))
    close(theirs(loaded.merge_and_unload()), expected)


CONFIGS = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "rslora": {"target_modules": "layers.*proj", "use_rslora": True, "lora_dropout": 0.1},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "out_proj"],
        "rank_pattern": {"q_proj": 2, r"^layers\.0\.k_proj": 5},
        "alpha_pattern": {r"layers\.\d\.(q|out)_proj": 7},
    },
    "excluded": {"target_modules": ["q_proj"], "exclude_modules": ["0.q_proj"]},
    "gaussian": {"target_modules": ["layers.1.v_proj"], "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": ["q_proj", "out_proj"], "init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_what_peft_saved_is_computed_here(config, tmp_path):
    their = peft.get_peft_model(TorchNet(), peft.LoraConfig(r=4, lora_alpha=6, **config))
    randomize(their)
    their.save_pretrained(tmp_path)
    model = Net()
    nys.lora.load_peft(model, tmp_path)
    expected = theirs(their)
    assert np.abs(expected - theirs(TorchNet())).max() > 1e-2
    close(ours(model), expected)
    nys.lora.activate(model, ())
    np.testing.assert_array_equal(ours(model), ours(Net()))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_that_change_the_base(init, tmp_path):
    """PEFT changes W_0 as it loads such a file; converted by PEFT, the file is plain LoRA."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init)
    their = peft.get_peft_model(TorchNet(), config)
    their.peft_config["default"].init_lora_weights = True
    their.save_pretrained(tmp_path / "start")
    their.peft_config["default"].init_lora_weights = init
    randomize(their)
    their.save_pretrained(tmp_path / "mutating")
    with pytest.raises(ValueError, match="init_lora_weights"):
        nys.lora.load_peft(Net(), tmp_path / "mutating")
    expected = theirs(their)
    their.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start"
    )
    model = Net()
    nys.lora.load_peft(model, tmp_path / "plain")
    close(ours(model), expected)


def test_a_layer_whose_name_ends_with_that_of_an_adapted_one(tmp_path):
    model = nnx.Dict(q_proj=nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0)), net=Net())
    nys.lora.apply(model, 2, targets="q_proj", key=KEY)
    nys.lora.save_peft(model, tmp_path, base_model="net")
    base = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(WIDTH, WIDTH), "net": TorchNet()})
    loaded = strictly(peft.PeftModel.from_pretrained, base, tmp_path)
    assert loaded.targeted_module_names == ["q_proj"]


def test_two_adapters_on_one_base(tmp_path):
    model = Net()
    for name, init, targets in (("first", "nora", ".*(q|v)_proj"), ("second", "lora", ".*")):
        nys.lora.apply(model, 2, targets=targets, init=init, name=name, key=KEY)
        train(model, name)
        nys.lora.save_peft(model, tmp_path / name, base_model="net", name=name)
    loaded = peft.PeftModel.from_pretrained(TorchNet(), tmp_path / "first", adapter_name="first")
    strictly(loaded.load_adapter, tmp_path / "second", adapter_name="second")
    again = Net()
    for name in ("second", "first"):
        nys.lora.load_peft(again, tmp_path / name, name=name)
    outputs = []
    for name in ("first", "second"):
        nys.lora.activate(model, name)
        nys.lora.activate(again, name)
        loaded.set_adapter(name)
        outputs.append(ours(model))
        close(theirs(loaded), outputs[-1])
        close(ours(again), outputs[-1])
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-2
    with loaded.disable_adapter():
        np.testing.assert_array_equal(theirs(loaded), theirs(TorchNet()))


def test_what_peft_only_warns_of_is_refused(tmp_path):
    model = Net()
    nys.lora.apply(model, 2, targets=".*", key=KEY)
    train(model)
    nys.lora.save_peft(model, tmp_path, base_model="net")
    tensors = safetensors.numpy.load_file(tmp_path / TENSORS)
    lost = {k: v for k, v in tensors.items() if "layers.1.q_proj" not in k}
    renamed = {k.replace("layers.1.q_proj", "layers.1.wq"): v for k, v in tensors.items()}
    moved = {k.replace("base_model.model.", "model."): v for k, v in tensors.items()}
    for mutated in (lost, renamed, moved):
        safetensors.numpy.save_file(mutated, tmp_path / TENSORS, {"format": "pt"})
        with pytest.warns(UserWarning, match="missing adapter keys"):
            loaded = peft.PeftModel.from_pretrained(TorchNet(), tmp_path)
        assert np.abs(theirs(loaded) - ours(model)).max() > 1e-3
        with pytest.raises(ValueError, match=r"layers\.1|holds"):
            nys.lora.load_peft(Net(), tmp_path)


def test_adapters_of_flax_and_qwix_are_read(tmp_path):
    qwix = pytest.importorskip("qwix")
    kernels = [np.array(nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(i)).kernel[...]) for i in range(2)]

    def torch_net():
        net = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in kernels))
        for layer, kernel in zip(net, kernels, strict=True):
            layer.weight.data = torch.tensor(kernel.T)
        return net

    rngs, options = nnx.Rngs(0), {"use_bias": False, "rngs": nnx.Rngs(0)}
    plain = nnx.Sequential(*(nnx.Linear(WIDTH, WIDTH, **options) for _ in kernels))
    flax = nnx.Sequential(
        nnx.LoRALinear(WIDTH, WIDTH, lora_rank=2, **options),
        nnx.LoRA(WIDTH, 3, WIDTH, base_module=nnx.Linear(WIDTH, WIDTH, **options), rngs=rngs),
    )
    for layer, kernel in zip(plain.layers, kernels, strict=True):
        layer.kernel[...] = kernel
    flax.layers[0].kernel[...], flax.layers[1].base_module.kernel[...] = kernels
    provider = qwix.LoraProvider(module_path=".*", rank=2, alpha=5.0)
    qwixed = qwix.apply_lora_to_model(plain, provider, jnp.asarray(X), rngs=rngs)
    rng = np.random.default_rng(0)
    for name, model, alpha in (("flax", flax, None), ("qwix", qwixed, 5.0)):
        for _, value in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
            value[...] += 0.2 * rng.standard_normal(value.shape).astype(np.float32)
        folder = tmp_path / name
        names = {f"layers.{i}": str(i) for i in range(2)}
        nys.lora.save_peft(model, folder, base_model="net", names=names, alpha=alpha)
        loaded = strictly(peft.PeftModel.from_pretrained, torch_net(), folder)
        expected = ours(model)
        assert np.abs(expected - theirs(torch_net())).max() > 1e-2
        close(theirs(loaded), expected)
