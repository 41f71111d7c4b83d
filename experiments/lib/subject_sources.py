"""Where the images, the base and the latents of `experiments/table3.py` come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image, ImageOps

import nyscaled as nys
from experiments.lib.subject_base import NEW, Base, prompt_of
from experiments.lib.subject_images import CENTRE, Latents, Split, Subjects, chosen
from experiments.lib.subject_runs import Part, Subject
from nyscaled.diffusion import Schedule, UNet

OTHERS = 5
"""Images of other subjects by which it is measured what the training does to these."""


class Source(Protocol):
    """What runs need.

    Attributes:
        unet: the base.
        schedule: its noise.
        split: which subjects are used for what.
        shape: shape of latents.
        prompt: prompt of a new subject.
    """

    unet: UNet
    schedule: Schedule
    split: Split
    shape: tuple[int, ...]
    prompt: str

    def subject(self, number: int, seed: int) -> Subject:
        """Return the images of a subject, split by a seed."""
        ...

    def context(self, prompt: str) -> Any:
        """Return what the U-Net reads of a prompt, (1, length, features)."""
        ...

    def decode(self, latents: Any) -> np.ndarray:
        """Return images with values in [0, 1], (…, height, width) or with colours at the end."""
        ...

    def pictures(self, number: int, seed: int) -> np.ndarray:
        """Return the images to train on, as `decode` has them."""
        ...


class Small:
    """The base that is trained here, and images of its kind.

    Args:
        subjects: the images.
        base: the base.
        images: number of images to train on.
    """

    def __init__(self, subjects: Subjects, base: Base, images: int) -> None:
        self.subjects, self.base, self.images = subjects, base, images
        self.unet, self.schedule, self.split = base.unet, Schedule(), subjects.split
        self.latents = Latents.of(subjects)
        self.prompt = prompt_of(subjects.kind, NEW)
        known = subjects.split.known[:OTHERS]
        pictures = [chosen(subjects, number, 0, 1)[0] for number in known]
        self.others = self._part(
            np.concatenate(pictures), [prompt_of(subjects.kind, str(number)) for number in known]
        )
        self.shape = self.others.mean.shape[2:]

    def _part(self, images: np.ndarray, prompts: list[str]) -> Part:
        mean = jnp.asarray(self.latents.crops(images))
        context = jnp.concatenate([self.context(prompt) for prompt in prompts])
        return Part(mean, jnp.zeros_like(mean), context)

    def subject(self, number: int, seed: int) -> Subject:
        """Return the images of a subject, split by a seed."""
        own, held_out = chosen(self.subjects, number, seed, self.images)
        prompts = [self.prompt] * self.images
        return Subject(self._part(own, prompts), self._part(held_out, prompts), self.others)

    def context(self, prompt: str) -> Any:
        """Return what the U-Net reads of a prompt, (1, length, features)."""
        return self.base.context(prompt)

    def decode(self, latents: Any) -> np.ndarray:
        """Return grey levels, (…, height, width)."""
        return self.latents.decode(np.asarray(latents))

    def pictures(self, number: int, seed: int) -> np.ndarray:
        """Return the images to train on, cut at the centre."""
        own, _ = chosen(self.subjects, number, seed, self.images)
        return self.latents.decode(self.latents.crops(own)[:, CENTRE])


class Folders(NamedTuple):
    """Images of subjects in folders of their own, in the order of their names."""

    names: list[str]
    paths: list[list[Path]]


def folders(images: Path) -> Folders:
    """Return the folders of subjects with their images.

    Args:
        images: folder that has a folder per subject.

    Raises:
        ValueError: if there are fewer than three subjects, or one has fewer than two images.
    """
    suffixes = Image.registered_extensions()
    found = sorted(path for path in images.iterdir() if path.is_dir())
    paths = [sorted(p for p in f.iterdir() if p.suffix.lower() in suffixes) for f in found]
    few = [f.name for f, own in zip(found, paths, strict=True) if len(own) < 2]
    if len(found) < 3 or few:
        raise ValueError(
            f"{images} has {len(found)} folders{f', {few[0]} without two images' if few else ''}; "
            "expected three subjects at least, with two images or more each"
        )
    return Folders([f.name for f in found], paths)


class Real:
    """A pipeline in a folder, and photographs in a folder per subject.

    Half of a subject's images, at most as many as `images`, are trained on; as many are held out.
    They are cut to a square at the centre.

    Args:
        model: folder of the pipeline, or its name on the hub.
        images: folder with a folder per subject.
        count: most images to train on.
        tuning: number of subjects for learning rates, the first ones.
        dtype: dtype of the models.
    """

    def __init__(self, model: str, images: Path, count: int, tuning: int, dtype: str) -> None:
        self.folders = folders(images)
        self.pipe = nys.diffusion.load(model, dtype=dtype)
        self.unet, self.schedule = self.pipe.unet, self.pipe.schedule
        numbers = list(range(len(self.folders.names)))
        self.split = Split([], numbers[:tuning], numbers[tuning:])
        self.images = min(count, min(map(len, self.folders.paths)) // 2)
        self.prompt = "a photo of sks"
        factor = 2 ** (len(self.pipe.autoencoder.config.block_out_channels) - 1)
        size = self.unet.config.sample_size
        self.side = (size if isinstance(size, int) else 64) * factor
        self.shape = (self.side // factor, self.side // factor, self.unet.config.in_channels)

    def _photographs(self, number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        paths = self.folders.paths[number]
        order = np.random.default_rng([seed, number]).permutation(len(paths))
        read = np.stack([self._read(paths[i]) for i in order[: 2 * self.images]])
        return read[: self.images], read[self.images :]

    def _read(self, path: Path) -> np.ndarray:
        with Image.open(path) as image:
            square = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (self.side,) * 2)
        return np.asarray(square, np.float32) / 255

    def _part(self, images: np.ndarray, prompts: list[str]) -> Part:
        moments = [_moments(self.pipe.autoencoder, image[None] * 2 - 1) for image in images]
        mean, deviation = (jnp.concatenate(x)[:, None] for x in zip(*moments, strict=True))
        return Part(mean, deviation, self.pipe.encode_texts(prompts))

    def subject(self, number: int, seed: int) -> Subject:
        """Return the images of a subject, split by a seed."""
        own, held_out = self._photographs(number, seed)
        other = self.split.tuning[0]
        others, _ = self._photographs(other, 0)
        prompts = [self.prompt] * len(own)
        name = self.folders.names[other].replace("_", " ")
        return Subject(
            self._part(own, prompts),
            self._part(held_out, prompts),
            self._part(others, [f"a photo of a {name}"] * len(others)),
        )

    def context(self, prompt: str) -> Any:
        """Return what the U-Net reads of a prompt, (1, length, features)."""
        return self.pipe.encode_texts([prompt])

    def decode(self, latents: Any) -> np.ndarray:
        """Return images, (…, height, width, colours)."""
        flat = jnp.reshape(jnp.asarray(latents), (-1, *self.shape))
        images = jnp.concatenate([_decoded(self.pipe.autoencoder, x[None]) for x in flat])
        return np.asarray(images).reshape(*np.shape(latents)[:-3], *images.shape[1:])

    def pictures(self, number: int, seed: int) -> np.ndarray:
        """Return the images to train on."""
        return self._photographs(number, seed)[0]


@nnx.jit
def _moments(autoencoder: nys.diffusion.Autoencoder, images: Any) -> Any:
    means, log_variances = autoencoder.moments(images)
    factor = autoencoder.config.scaling_factor
    return factor * means, factor * jnp.exp(log_variances.astype(jnp.float32) / 2)


@nnx.jit
def _decoded(autoencoder: nys.diffusion.Autoencoder, latents: Any) -> Any:
    return jnp.clip(autoencoder.decode(latents).astype(jnp.float32) / 2 + 0.5, 0, 1)
