"""The noise that is added to latents: how much at which time, and what models predict of it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from nyscaled.checkpoints.files import JsonObject
from nyscaled.diffusion.settings import Settings
from nyscaled.matrices import as_array
from nyscaled.validation import is_concrete

MOST_TIMES = 10**6  # a number for each is in memory; models have a thousand
EPSILON, V = "epsilon", "v_prediction"
SPACINGS = "leading", "linspace", "trailing"
PNDM, DDIM, EULER, DDPM = (f"{name}Scheduler" for name in ("PNDM", "DDIM", "EulerDiscrete", "DDPM"))
HEUN = "HeunDiscreteScheduler"
# Of the same noise, with samplers that are not here.
OTHERS = (
    *("DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler"),
    *("LMSDiscreteScheduler", "UniPCMultistepScheduler", HEUN),
)
# Of a file that lacks them; a schedule made without a file has those of Stable Diffusion.
FILE_DEFAULTS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
HEUN_DEFAULTS = {"beta_start": 0.00085, "beta_end": 0.012}

Latents = Float[Array, "batch height width channels"]
Steps = Int[Array, " batch"] | Int[np.ndarray, " batch"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule(Settings):
    """The noise of Ho et al., 2020, at times 0, 1, …; the defaults are Stable Diffusion's.

    At time t latents z are √ᾱ_t z + √(1 − ᾱ_t) ε, where ε is normal and ᾱ_t = Π_{s ≤ t}(1 − β_s).

    Attributes:
        num_train_timesteps: number of times.
        beta_start: first β.
        beta_end: last β.
        beta_schedule: whether β ("linear") or √β ("scaled_linear") grows linearly.
        prediction_type: what the model predicts: ε ("epsilon"), or √ᾱ ε − √(1 − ᾱ) z
            ("v_prediction"; Salimans and Ho, 2022).
        steps_offset: what samplers add to times that are spaced as "leading".
        set_alpha_to_one: whether DDIM and PLMS end at latents without noise, and not at time 0;
            None, which is that of a file without it, for DDIM only.
        timestep_spacing: how samplers choose times; None for "linspace" in Euler's method and
            "leading" in the others.
        scheduler: name of the class in diffusers that `scheduler_config.json` has.

    Examples:
        >>> schedule = Schedule()
        >>> [f"{schedule.alphas[time]:.4f}" for time in (0, 499, 999)]
        ['0.9991', '0.2777', '0.0047']
    """

    class_name = PNDM
    # Of any of the classes; settings that are not here are not read.
    fixed: ClassVar = {
        "trained_betas": (None,),
        "clip_sample": (False, None),
        "thresholding": (False, None),
        "skip_prk_steps": (True,),
        "rescale_betas_zero_snr": (False, None),
        "use_karras_sigmas": (False, None),
        "use_exponential_sigmas": (False, None),
        "use_beta_sigmas": (False, None),
        "use_flow_sigmas": (False, None),
        "timestep_type": ("discrete", None),
        "interpolation_type": ("linear", None),
        "final_sigmas_type": ("zero", None),
        "variance_type": ("fixed_small", None),
    }
    # Those of `fixed` that only samplers read, with the classes in whose files they are checked:
    # there the sampler of that name would differ.
    sampling: ClassVar = {
        "clip_sample": (),
        "skip_prk_steps": (),
        "thresholding": (DDIM, DDPM),
        "use_karras_sigmas": (EULER,),
        "use_exponential_sigmas": (EULER,),
        "use_beta_sigmas": (EULER,),
        "interpolation_type": (EULER,),
        "final_sigmas_type": (EULER,),
    }

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = EPSILON
    steps_offset: int = 1
    set_alpha_to_one: bool | None = False
    timestep_spacing: str | None = None
    scheduler: str = PNDM

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (
            ("beta_schedule", ("scaled_linear", "linear")),
            ("prediction_type", (EPSILON, V)),
            ("timestep_spacing", (*SPACINGS, None)),
            ("scheduler", (PNDM, DDIM, EULER, DDPM, *OTHERS)),
        ):
            if (value := getattr(self, name)) not in known:
                raise ValueError(
                    f"{name} is {value!r:.80}; expected one of {', '.join(map(repr, known))}"
                )
        if self.num_train_timesteps > MOST_TIMES:
            raise ValueError(
                f"num_train_timesteps is {self.num_train_timesteps}; expected at most {MOST_TIMES}"
            )
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start is {self.beta_start} and beta_end {self.beta_end}; expected "
                "0 < beta_start ≤ beta_end < 1"
            )
        first, last = self.alphas[0], self.alphas[-1]
        if first == 1 or last < np.finfo(np.float32).tiny:
            raise ValueError(
                f"ᾱ falls from {first:g} to {last:g}; expected β of which float32 distinguishes "
                "the first ᾱ from 1 and the last from 0"
            )

    @classmethod
    def from_json(cls, config: JsonObject) -> Schedule:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the schedule of a file.

        Samples are never clipped, also where diffusers would clip: that is for pixels. PLMS has no
        Runge-Kutta steps, also where `skip_prk_steps` is false. Other settings that only samplers
        read are refused in the file of a sampler that is here and would differ, such as
        `use_karras_sigmas` in that of Euler's method; in files of other classes they are not read.

        Args:
            config: what `scheduler_config.json` holds.

        Raises:
            ValueError: on another kind of noise, and on settings with which the sampler of the
                file's class would differ.
        """
        named = config.get("_class_name")
        if named not in (PNDM, DDIM, EULER, DDPM, *OTHERS):
            raise ValueError(
                f"_class_name is {named!r:.80}; expected one of "
                f"{', '.join((PNDM, DDIM, EULER, DDPM, *OTHERS))}"
            )
        fields = {field.name for field in dataclasses.fields(cls)} - {"scheduler"}
        unread = {name for name, classes in cls.sampling.items() if named not in classes}
        read = (fields | cls.fixed.keys()) - unread
        ours = {name: config[name] for name in read if name in config}
        missing = {**FILE_DEFAULTS, "steps_offset": 0, "set_alpha_to_one": None}
        missing |= HEUN_DEFAULTS if named == HEUN else {}
        values = {"_class_name": PNDM, **missing, **ours, "scheduler": named}
        return super().from_json(values)

    def to_json(self) -> JsonObject:
        """Return what `scheduler_config.json` is to hold.

        Settings of samplers that are not here are not written; `clip_sample` and `skip_prk_steps`
        are, as the samplers here have them.
        """
        values = super().to_json()
        values["_class_name"] = values.pop("scheduler")
        if values["timestep_spacing"] is None:  # each class of diffusers has its own default
            del values["timestep_spacing"]
        for name, classes in self.sampling.items():
            if classes and self.scheduler not in classes:  # not read: it may have another value
                del values[name]
        return {name: value for name, value in values.items() if value is not None}

    @property
    def alphas(self) -> Float[np.ndarray, " times"]:
        """ᾱ at each time, in float32."""
        return self.exact_alphas.astype(np.float32)

    @property
    def exact_alphas(self) -> Float[np.ndarray, " times"]:
        """ᾱ at each time, in float64."""
        root = 0.5 if self.beta_schedule == "scaled_linear" else 1.0
        start, end = self.beta_start**root, self.beta_end**root
        betas = np.linspace(start, end, self.num_train_timesteps) ** (1 / root)
        return np.cumprod(1 - betas)

    def noisy(self, latents: Latents, noise: Latents, times: Steps) -> Latents:
        """Return latents with noise.

        Args:
            latents: latents of images.
            noise: numbers from the normal distribution.
            times: time of each of them, from 0 to `num_train_timesteps` − 1.

        Raises:
            ValueError: on other times, and on arrays of which not all have that many images.
        """
        signal, scale = self._parts(times)
        latents, noise = as_batch(latents, noise, times)
        return signal * latents + scale * noise

    def target(self, latents: Latents, noise: Latents, times: Steps) -> Latents:
        """Return what the model is to predict from `noisy(latents, noise, times)`.

        Args:
            latents: latents of images.
            noise: numbers from the normal distribution.
            times: time of each of them.

        Raises:
            ValueError: as `noisy` does.
        """
        self._index(times)
        latents, noise = as_batch(latents, noise, times)
        if self.prediction_type == EPSILON:
            return noise
        signal, scale = self._parts(times)
        return signal * noise - scale * latents

    def signal_to_noise(self, times: Steps) -> Float[Array, " batch"]:
        """Return ᾱ/(1 − ᾱ) at times.

        Args:
            times: times from 0 to `num_train_timesteps` − 1.

        Raises:
            ValueError: on other times.
        """
        alphas = self.exact_alphas
        return jnp.asarray(alphas / (1 - alphas), jnp.float32)[self._index(times)]

    def _index(self, times: ArrayLike) -> Array:
        """Times that are known to be in the schedule; JAX would take the nearest of others."""
        index, count = as_array("times", times), self.num_train_timesteps
        if index.ndim != 1 or not jnp.issubdtype(index.dtype, jnp.integer):
            raise ValueError(
                f"times are {index.dtype} of shape {index.shape}; expected integers (batch,)"
            )
        if is_concrete(index) and not bool(((index >= 0) & (index < count)).all()):
            raise ValueError(
                f"times are not all from 0 to {count - 1}; expected times of the schedule"
            )
        return index

    def _parts(self, times: ArrayLike) -> tuple[Array, Array]:
        """√ᾱ and √(1 − ᾱ) at times, with axes for the latents."""
        alphas, index = self.exact_alphas, self._index(times)
        parts = (jnp.asarray(np.sqrt(x), jnp.float32)[index] for x in (alphas, 1 - alphas))
        signal, scale = (part[:, None, None, None] for part in parts)
        return signal, scale


def as_batch(latents: ArrayLike, noise: ArrayLike, times: ArrayLike) -> tuple[Array, Array]:
    """Return latents and noise as arrays of one shape, in which each image has its time.

    Args:
        latents: latents of images.
        noise: the noise of each.
        times: the time of each.

    Raises:
        ValueError: on arrays that are not floats, and on other shapes.
    """
    latents, noise = as_array("latents", latents), as_array("noise", noise)
    for name, x in (("latents", latents), ("noise", noise)):
        if x.ndim != 4 or 0 in x.shape or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"{name} is {x.dtype} of shape {x.shape}; expected floats (batch, height, width, "
                "channels)"
            )
    if noise.shape != latents.shape or np.shape(times) != latents.shape[:1]:
        raise ValueError(
            f"noise has shape {noise.shape} and times {np.shape(times)}; expected {latents.shape} "
            f"and {latents.shape[:1]}, as latents"
        )
    return latents, noise
