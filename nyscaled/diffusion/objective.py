"""What is minimized in training: the error of predictions at random times."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from nyscaled.diffusion.schedule import EPSILON, Latents, Schedule, Steps, as_batch
from nyscaled.validation import require_count, require_nonnegative, require_positive

Text = Float[Array, "batch length features"]
Predict = Callable[[Array, Array, Array], Array]


def denoising_loss(
    predict: Predict,
    schedule: Schedule,
    latents: Latents,
    context: Text,
    noise: Latents,
    times: Steps,
    *,
    min_snr: float | None = None,
    prior_rows: int = 0,
    prior_weight: float = 1.0,
) -> Float[Array, ""]:
    """Return the mean squared error of predictions from latents with noise, in float32.

    The target is ε or v, as the schedule says. Noise and times are arguments, so that losses of
    several models, or before and after training, can be compared on the same draws.

    Args:
        predict: the U-Net, or a function like it of latents, times and context.
        schedule: the noise.
        latents: latents of images.
        context: what `Pipeline.encode_texts` returns for the text of each image.
        noise: numbers from the normal distribution.
        times: time of each image, from 0 to `schedule.num_train_timesteps` − 1.
        min_snr: γ of Hang et al., 2023, who found 5 to be good. The error at each time is
            multiplied by min(SNR, γ)/SNR, for v by min(SNR, γ)/(SNR + 1), where SNR is the
            signal-to-noise ratio. None for equal weights.
        prior_rows: number of the last images that show the class, and not the subject (Ruiz et al.,
            2023). The loss is then the sum of the means over both kinds.
        prior_weight: factor of the mean over the images of the class.

    Raises:
        ValueError: on latents or noise that are not floats, shapes that do not go together, times
            that the schedule does not have, a `min_snr` that is not positive, and on more images of
            the class than there are images but one.

    Examples:
        >>> latents, noise = jnp.zeros((2, 4, 4, 4)), jnp.ones((2, 4, 4, 4))
        >>> context, times = jnp.zeros((2, 3, 5)), jnp.array([10, 900])
        >>> silent = lambda latents, times, context: 0 * latents
        >>> denoising_loss(silent, Schedule(), latents, context, noise, times)
        Array(1., dtype=float32)
    """
    require_count("prior_rows", prior_rows)
    require_nonnegative("prior_weight", prior_weight)
    latents, noise = as_batch(latents, noise, times)
    if prior_rows and prior_rows >= len(latents):
        raise ValueError(
            f"prior_rows is {prior_rows} of {len(latents)}; expected one image of the subject at "
            "least"
        )
    times = jnp.asarray(times)
    prediction = predict(schedule.noisy(latents, noise, times), times, context)
    target = schedule.target(latents, noise, times).astype(jnp.float32)
    if prediction.shape != target.shape:
        raise ValueError(f"predict returned shape {prediction.shape}; expected {target.shape}")
    errors = jnp.mean((prediction.astype(jnp.float32) - target) ** 2, axis=(1, 2, 3))
    if min_snr is not None:
        require_positive("min_snr", min_snr)
        ratio = schedule.signal_to_noise(times)
        total = ratio if schedule.prediction_type == EPSILON else ratio + 1
        errors = errors * jnp.minimum(ratio, min_snr) / total
    subject = len(errors) - prior_rows
    loss = jnp.mean(errors[:subject])
    return loss + prior_weight * jnp.mean(errors[subject:]) if prior_rows else loss
