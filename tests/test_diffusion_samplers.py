"""Noise, targets and samplers: the numbers of diffusers, and identities that they obey."""

import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_cases import FOLDER, close, expected

import nyscaled as nys
from nyscaled.diffusion.samplers import table

STEPS = 10
SAMPLERS = "ddim", "plms", "euler", "ddpm"
SPACINGS = "leading", "linspace", "trailing"
GOLDEN = expected("samplers")


def schedule(**changes):
    return nys.diffusion.Schedule(**changes)


def toy(x, time):
    """The model of make_diffusion.py."""
    return 0.7 * jnp.sin(1.3 * x + time / 250) + 0.3 * jnp.roll(x, 1, axis=2)


def test_noise_has_its_published_check_values():
    alphas = schedule().alphas
    published = {0: 0.99914998, 1: 0.99829602, 499: 0.27766943, 999: 0.00466010}
    for time, value in published.items():
        assert alphas[time] == pytest.approx(value, rel=3e-6)
    np.testing.assert_allclose(alphas[[0, 1, 250, 499, 750, 998, 999]], GOLDEN["alphas"], rtol=1e-5)
    assert table(schedule(), "euler", 50).start[0] == pytest.approx(14.614647, rel=1e-5)
    twenty = table(schedule(timestep_spacing="leading"), "euler", 20)
    assert twenty.time[0] == 951
    assert twenty.start[0] == pytest.approx(11.0736, rel=1e-5)
    fifty = table(schedule(), "ddim", 50).time
    np.testing.assert_array_equal(fifty, np.arange(981, 0, -20))
    assert list(table(schedule(), "plms", 50).time[:4]) == [981, 961, 961, 941]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_times_are_those_of_diffusers(sampler, prediction):
    for spacing in SPACINGS:
        own = schedule(prediction_type=prediction, timestep_spacing=spacing)
        times = GOLDEN[f"{sampler}.{prediction}.{spacing}.times"]
        np.testing.assert_allclose(table(own, sampler, STEPS).time, times, rtol=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS[:3])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_trajectories_are_those_of_diffusers(sampler, prediction):
    for spacing in SPACINGS:
        own = schedule(prediction_type=prediction, timestep_spacing=spacing)
        latents = nys.diffusion.trajectory(
            toy, own, jnp.asarray(GOLDEN["noise"]), steps=STEPS, sampler=sampler
        )
        golden = GOLDEN[f"{sampler}.{prediction}.{spacing}"]
        close(np.asarray(latents)[[0, 1, 2, 4, -1]], golden)


def test_ddpm_adds_the_noise_of_diffusers():
    name = "ddpm.epsilon.leading"
    numbers, x = table(schedule(), "ddpm", STEPS), GOLDEN["noise"]
    for i, latents in enumerate(GOLDEN[f"{name}.all"]):
        prediction = np.asarray(toy(x, numbers.time[i]))
        x = (
            numbers.a[i] * x
            + numbers.b[i] * prediction
            + numbers.c[i] * GOLDEN[f"{name}.noises"][i]
        )
        close(x, latents)
    for spacing in SPACINGS:
        own = schedule(prediction_type="v_prediction", timestep_spacing=spacing)
        first, row = GOLDEN[f"ddpm.v_prediction.{spacing}"][0], table(own, "ddpm", STEPS)
        prediction = np.asarray(toy(GOLDEN["noise"], row.time[0]))
        x = row.a[0] * GOLDEN["noise"] + row.b[0] * prediction
        close(x + row.c[0] * GOLDEN[f"{name}.noises"][0], first)


def test_ddpm_draws_by_its_key():
    noise, key = jnp.asarray(GOLDEN["noise"]), jax.random.key(3)
    numbers = table(schedule(), "ddpm", STEPS)
    latents = nys.diffusion.trajectory(toy, schedule(), noise, steps=STEPS, sampler="ddpm", key=key)
    x = noise
    for i in range(STEPS):
        fresh = jax.random.normal(jax.random.fold_in(key, i), x.shape)
        x = numbers.a[i] * x + numbers.b[i] * toy(x, numbers.time[i]) + numbers.c[i] * fresh
        close(latents[i], x, 1e-5)
    last = nys.diffusion.sample(toy, schedule(), noise, steps=STEPS, sampler="ddpm", key=key)
    close(last, latents[-1], 1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_with_the_true_noise_every_sampler_finds_the_latents(prediction):
    """The model knows z: DDIM, PLMS and Euler's method end there, from any noise."""
    own = schedule(prediction_type=prediction, set_alpha_to_one=True)
    clean, noise = jnp.asarray(GOLDEN["noise"][::-1]), jnp.asarray(GOLDEN["noise"])
    for sampler in SAMPLERS[:3]:
        numbers = table(own, sampler, STEPS)
        alphas = np.interp(numbers.time, np.arange(1000), own.alphas)
        lookup = jnp.asarray(np.interp(np.arange(1000), numbers.time[::-1], alphas[::-1]))

        def predict(x, time, lookup=lookup):
            alpha = lookup[jnp.round(time).astype(int)]
            of_noise = (x - jnp.sqrt(alpha) * clean) / jnp.sqrt(1 - alpha)
            if prediction == "epsilon":
                return of_noise
            return jnp.sqrt(alpha) * of_noise - jnp.sqrt(1 - alpha) * clean

        latents = nys.diffusion.sample(predict, own, noise, steps=STEPS, sampler=sampler)
        close(latents, clean, 0.02)


def test_targets_invert_the_noise():
    clean, noise = jnp.asarray(GOLDEN["noise"]), jnp.asarray(GOLDEN["noise"][::-1])
    times = jnp.array([3, 700])
    own = schedule(prediction_type="v_prediction")
    x, v = own.noisy(clean, noise, times), own.target(clean, noise, times)
    alpha = jnp.asarray(own.alphas)[times][:, None, None, None]
    close(jnp.sqrt(alpha) * x - jnp.sqrt(1 - alpha) * v, clean, 1e-5)
    close(jnp.sqrt(alpha) * v + jnp.sqrt(1 - alpha) * x, noise, 1e-5)
    np.testing.assert_array_equal(schedule().target(clean, noise, times), noise)
    ratio = own.signal_to_noise(times)
    np.testing.assert_allclose(ratio, (alpha / (1 - alpha)).ravel(), rtol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("times", [[3, 1000], [-1, 3], [0.5, 3.0], 3])
def test_times_that_are_not_in_the_schedule_are_refused(times, prediction):
    own, times = schedule(prediction_type=prediction), np.asarray(times)
    clean = jnp.asarray(GOLDEN["noise"])
    for use in (
        lambda: inspect.unwrap(nys.diffusion.Schedule.noisy)(own, clean, clean, times),
        lambda: inspect.unwrap(nys.diffusion.Schedule.target)(own, clean, clean, times),
        lambda: inspect.unwrap(nys.diffusion.Schedule.signal_to_noise)(own, times),
    ):
        with pytest.raises(ValueError, match="times are"):
            use()


@pytest.mark.parametrize("name", ["noisy", "target"])
def test_latents_noise_and_times_must_go_together(name):
    use = inspect.unwrap(getattr(nys.diffusion.Schedule, name))
    clean, times = jnp.asarray(GOLDEN["noise"]), jnp.array([3, 700])
    for latents, noise, of, message in (
        (clean, clean[:1], times, "noise has shape"),
        (clean, clean, times[:1], r"and times \(1,\); expected"),
        (clean[0], clean[0], times, "latents is float32 of shape"),
        (clean, clean.astype(int), times, "noise is int32 of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            use(schedule(), latents, noise, of)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_files_of_diffusers_are_read_and_written(sampler):
    file = FOLDER / "samplers" / sampler / "scheduler_config.json"
    config = json.loads(file.read_text())
    own = nys.diffusion.Schedule.from_json(config)
    np.testing.assert_array_equal(own.exact_alphas, schedule().exact_alphas)
    assert (own.steps_offset, own.timestep_spacing) == (1, config.get("timestep_spacing"))
    assert own.set_alpha_to_one is config.get("set_alpha_to_one")
    assert nys.diffusion.Schedule.from_json(own.to_json()) == own
    assert own.to_json()["_class_name"] == config["_class_name"]


def test_missing_settings_are_those_of_diffusers():
    own = nys.diffusion.Schedule.from_json({"_class_name": "DDIMScheduler"})
    assert (own.beta_start, own.beta_end, own.beta_schedule) == (0.0001, 0.02, "linear")
    assert (own.set_alpha_to_one, own.steps_offset) == (None, 0)
    assert own.exact_alphas[-1] == pytest.approx(np.prod(1 - np.linspace(1e-4, 0.02, 1000)))


@pytest.mark.parametrize(
    ("name", "stated"),
    [
        ("DDIMScheduler", {"clip_sample": True, "clip_sample_range": 1.0, "thresholding": False}),
        ("DDPMScheduler", {"clip_sample": True, "variance_type": "fixed_small"}),
        ("PNDMScheduler", {"skip_prk_steps": False, "clip_sample": None}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "thresholding": True}),
        ("LMSDiscreteScheduler", {"use_beta_sigmas": True, "use_exponential_sigmas": True}),
        ("UniPCMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
    ],
)
def test_settings_of_samplers_that_are_never_run_are_not_read(name, stated):
    plain = nys.diffusion.Schedule.from_json({"_class_name": name})
    read = nys.diffusion.Schedule.from_json({"_class_name": name, **stated})
    assert read == plain
    assert nys.diffusion.Schedule.from_json(read.to_json()) == plain
    ours = {
        "clip_sample": False,
        "skip_prk_steps": True,
    }  # of what was stated, the rest is as it was
    assert {**stated, **ours}.items() >= {
        key: value for key, value in read.to_json().items() if key in stated
    }.items()


@pytest.mark.parametrize("name", ["DDIM", "PNDM", "EulerDiscrete", "DDPM", "HeunDiscrete"])
def test_where_a_sampler_ends_by_default_depends_on_the_sampler(name):
    """As in diffusers' from_config: DDIM at latents without noise, PLMS at time 0."""
    plain = {"_class_name": f"{name}Scheduler"}
    for sampler, end in (("ddim", True), ("plms", False)):
        own, stated, other = (
            table(nys.diffusion.Schedule.from_json(plain | each), sampler, STEPS).a
            for each in ({}, {"set_alpha_to_one": end}, {"set_alpha_to_one": not end})
        )
        np.testing.assert_array_equal(own, stated)
        assert own[-1] != other[-1]


def test_a_file_of_heuns_method_has_its_own_default_noise():
    own = nys.diffusion.Schedule.from_json({"_class_name": "HeunDiscreteScheduler"})
    assert (own.beta_start, own.beta_end, own.beta_schedule) == (0.00085, 0.012, "linear")


EULER = {"_class_name": "EulerDiscreteScheduler"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name is 'FlowMatch"),
        ({"prediction_type": "sample"}, "prediction_type is 'sample'"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule is"),
        ({"beta_end": 2.0}, "expected 0 < beta_start"),
        ({"beta_end": 0.99}, "ᾱ falls from .* to 0; expected"),
        ({"beta_start": 1e-30, "beta_end": 1e-20}, "ᾱ falls from 1 to 1; expected"),
        ({"thresholding": True}, "thresholding is True"),
        ({"timestep_type": "continuous"}, "timestep_type is 'continuous'"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True"),
        ({"trained_betas": [0.1]}, "trained_betas is"),
        ({"steps_offset": -1}, "steps_offset is -1"),
        ({"timestep_spacing": "log"}, "timestep_spacing is 'log'"),
        ({**EULER, "interpolation_type": "log_linear"}, "interpolation_type is 'log_linear'"),
        ({**EULER, "use_karras_sigmas": True}, "use_karras_sigmas is True"),
        ({**EULER, "final_sigmas_type": "sigma_min"}, "final_sigmas_type is 'sigma_min'"),
    ],
)
def test_other_noise_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        nys.diffusion.Schedule.from_json({"_class_name": "DDIMScheduler", **changes})


def test_other_samplers_and_steps_are_refused():
    noise = jnp.asarray(GOLDEN["noise"])
    with pytest.raises(ValueError, match="key is None"):
        nys.diffusion.sample(toy, schedule(), noise, sampler="ddpm")
    with pytest.raises(ValueError, match=r"predict returned shape .*; expected"):
        nys.diffusion.sample(lambda x, time: x[:1], schedule(), noise)
    with pytest.raises(ValueError, match="sampler is 'heun'"):
        table(schedule(), "heun", 5)
    for steps, message in (
        (0, "expected an integer ≥ 1"),
        (1001, "at most 1000"),
        (1000, "fewer steps"),
    ):
        with pytest.raises(ValueError, match=message):
            table(schedule(), "ddim", steps)
