"""The loss of denoising: formulas in NumPy, and gradients that reach adapters only."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_cases import FOLDER
from flax import nnx

import nyscaled as nys

RNG = np.random.default_rng(0)
LATENTS, NOISE = (jnp.asarray(RNG.normal(size=(4, 3, 5, 4)), jnp.float32) for _ in range(2))
CONTEXT = jnp.asarray(RNG.normal(size=(4, 7, 6)), jnp.float32)
TIMES = jnp.array([0, 40, 500, 999])


def half(latents, times, context):
    """A model that depends on all that it is given."""
    return 0.5 * latents + times[:, None, None, None] / 1000 + context.mean(axis=(1, 2))[0]


def errors(schedule):
    """The mean squared error of each image, in float64."""
    alphas = schedule.exact_alphas[np.asarray(TIMES)][:, None, None, None]
    latents, noise = np.asarray(LATENTS, np.float64), np.asarray(NOISE, np.float64)
    noisy = np.sqrt(alphas) * latents + np.sqrt(1 - alphas) * noise
    velocity = np.sqrt(alphas) * noise - np.sqrt(1 - alphas) * latents
    target = noise if schedule.prediction_type == "epsilon" else velocity
    prediction = np.asarray(half(noisy, np.asarray(TIMES), np.asarray(CONTEXT)))
    return ((prediction - target) ** 2).mean(axis=(1, 2, 3)), alphas.ravel() / (1 - alphas.ravel())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_loss_is_its_formula(prediction):
    schedule = nys.diffusion.Schedule(prediction_type=prediction)
    each, ratio = errors(schedule)

    def loss(**options):
        return nys.diffusion.denoising_loss(
            half, schedule, LATENTS, CONTEXT, NOISE, TIMES, **options
        )

    np.testing.assert_allclose(loss(), each.mean(), rtol=1e-5)
    weights = np.minimum(ratio, 5) / (ratio + (prediction != "epsilon"))
    np.testing.assert_allclose(loss(min_snr=5.0), (weights * each).mean(), rtol=1e-5)
    both = each[:3].mean() + 0.7 * each[3:].mean()
    np.testing.assert_allclose(loss(prior_rows=1, prior_weight=0.7), both, rtol=1e-5)


def test_loss_is_float32_for_predictions_in_bfloat16():
    def narrow(latents, times, context):
        return half(latents, times, context).astype(jnp.bfloat16)

    schedule = nys.diffusion.Schedule()
    arguments = schedule, LATENTS, CONTEXT, NOISE, TIMES
    loss = nys.diffusion.denoising_loss(narrow, *arguments)
    assert loss.dtype == jnp.float32
    assert loss == pytest.approx(float(nys.diffusion.denoising_loss(half, *arguments)), rel=0.01)


def test_wrong_options_are_refused():
    schedule = nys.diffusion.Schedule()
    for options, message in (
        ({"min_snr": 0.0}, "min_snr is 0"),
        ({"prior_rows": 4}, "one image of the subject"),
        ({"prior_weight": -1.0}, "prior_weight is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            nys.diffusion.denoising_loss(half, schedule, LATENTS, CONTEXT, NOISE, TIMES, **options)


TARGETS = r".*\.(to_q|to_k|to_v|to_out\.0)"


def test_adapters_are_put_into_attention():
    unet = nys.diffusion.load_unet(FOLDER / "bk")
    layers = nys.lora.apply(unet, rank=2, targets=TARGETS, init="nora", key=jax.random.key(0))
    blocks = len(unet.down_blocks) + 2 * len(unet.up_blocks)
    assert len(layers) == 8 * blocks
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0" in layers
    with pytest.raises(ValueError, match=r"only down_blocks\.0\.resnets\.0\.conv1, a Conv"):
        nys.lora.apply(unet, rank=2, targets=r".*\.conv1", key=jax.random.key(0))
    with pytest.raises(ValueError, match="expected only its own parameters"):
        nys.diffusion.save(unet, "nowhere")


@pytest.mark.long
def test_training_of_adapters_lowers_the_loss_and_leaves_the_base():
    unet = nys.diffusion.load_unet(FOLDER / "bk")
    base = {path: np.asarray(x[...]) for path, x in nnx.to_flat_state(nnx.state(unet))}
    nys.lora.apply(
        unet, rank=2, targets=TARGETS + r"|.*\.(proj_in|proj_out)", key=jax.random.key(0)
    )
    schedule = nys.diffusion.Schedule()

    @nnx.jit
    def step(unet):
        def loss(unet):
            return nys.diffusion.denoising_loss(unet, schedule, LATENTS, CONTEXT, NOISE, TIMES)

        value, gradient = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(unet)
        state = nnx.state(unet, nnx.LoRAParam)
        nnx.update(unet, jax.tree.map(lambda x, g: x - 0.02 * g, state, gradient))
        return value

    losses = [float(step(unet)) for _ in range(30)]
    assert losses[-1] < 0.99 * losses[0]
    after = dict(nnx.to_flat_state(nnx.state(unet)))
    for path, value in base.items():
        np.testing.assert_array_equal(after[path][...], value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"noise": jnp.ones((1, 4, 4, 4))},
        {"latents": jnp.ones((0, 4, 4, 4)), "noise": jnp.ones((0, 4, 4, 4)), "times": TIMES[:0]},
        {"latents": jnp.ones((2, 4, 4, 4), int)},
        {"latents": jnp.ones(()), "prior_rows": 1},
        {"noise": np.ones((2, 4, 4, 4), bool)},
        {"noise": np.ones((2, 4, 4, 4), object)},
        {"times": jnp.array([3])},
        {"times": jnp.array([3, 5000])},
        {"predict": lambda x, times, context: x[..., :1]},
    ],
)
def test_arrays_of_other_shapes_and_times_are_refused(wrong):
    own = {
        "predict": lambda x, times, context: x,
        "schedule": nys.diffusion.Schedule(),
        "latents": jnp.ones((2, 4, 4, 4)),
        "context": jnp.ones((2, 3, 5)),
        "noise": jnp.ones((2, 4, 4, 4)),
        "times": jnp.array([3, 900]),
    }
    with pytest.raises(ValueError, match="expected"):
        # Tests check the types of arguments, which users do not.
        inspect.unwrap(nys.diffusion.denoising_loss)(**own | wrong)
