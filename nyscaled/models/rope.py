"""Rotary positions (Su et al., 2021), and their changes for longer texts."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nyscaled.checkpoints import files
from nyscaled.models.config import sound

Rotation = tuple[Float[Array, "*rows length half"], Float[Array, "*rows length half"]]
Length = int | Int[Array, ""]
THETA = 10000.0


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's change of slow rotations, for texts longer than in training.

    Rotations that turn less than `low_freq_factor` times within
    `original_max_position_embeddings` become `factor` times slower, those that turn more than
    `high_freq_factor` times stay, and the ones between are interpolated.
    """

    rope_type: ClassVar[str] = "llama3"
    attention_factor: ClassVar[float] = 1.0

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        if self.low_freq_factor > self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor is {self.low_freq_factor} and high_freq_factor "
                f"{self.high_freq_factor}; expected the first to be the smaller one"
            )

    def scaled(self, frequencies: np.ndarray, theta: float, length: Length) -> np.ndarray:
        """Return the changed frequencies."""
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = np.clip((turns - low) / max(high - low, 1e-12), 0, 1)  # the two may be equal
        return frequencies * (kept + (1 - kept) / self.factor)


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Every rotation `factor` times slower (Chen et al., 2023)."""

    rope_type: ClassVar[str] = "linear"
    attention_factor: ClassVar[float] = 1.0

    factor: float

    def scaled(self, frequencies: np.ndarray, theta: float, length: Length) -> np.ndarray:
        """Return the changed frequencies."""
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class DynamicScaling:
    """A base that grows with a text longer than in training ("dynamic NTK").

    All positions of one call have the base of its whole length. In generation a token keeps the
    rotation that it had when it was the last one, as in transformers.

    Attributes:
        factor: factor of the growth.
        max_position_embeddings: the length up to which nothing changes; the configuration's.
    """

    rope_type: ClassVar[str] = "dynamic"
    attention_factor: ClassVar[float] = 1.0

    factor: float
    max_position_embeddings: int

    def scaled(self, frequencies: np.ndarray, theta: float, length: Length) -> Any:
        """Return the changed frequencies, for a length that may be traced."""
        xp = np if isinstance(length, int) else jnp
        width, longest = 2 * len(frequencies), self.max_position_embeddings
        growth = self.factor * xp.maximum(length, longest) / longest - (self.factor - 1)
        exponents = np.arange(0, width, 2) / (width - 2)
        return frequencies * growth**-exponents


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """Slow rotations `factor` times slower, a ramp to unchanged fast ones (Peng et al., 2023).

    Attributes:
        factor: ratio of the length of texts to that in training.
        original_max_position_embeddings: longest text in training.
        attention_factor: factor of cosines and sines.
        beta_fast: turns within the original length from which a rotation is unchanged.
        beta_slow: turns up to which a rotation becomes `factor` times slower.
        truncate: whether the ends of the ramp are whole numbers of pairs.
    """

    rope_type: ClassVar[str] = "yarn"

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def scaled(self, frequencies: np.ndarray, theta: float, length: Length) -> np.ndarray:
        """Return the changed frequencies."""
        count, original = len(frequencies), self.original_max_position_embeddings

        def pair(turns: float) -> float:
            """Return where in the list rotations turn so often within the original length."""
            return count * math.log(original / (turns * 2 * math.pi)) / math.log(theta)

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * count - 1)
        if low == high:
            high += 0.001
        slowed = np.clip((np.arange(count) - low) / (high - low), 0, 1)
        return frequencies * (1 - slowed + slowed / self.factor)


Scaling = RopeScaling | LinearScaling | DynamicScaling | YarnScaling

_TYPES = {
    kind.rope_type: kind for kind in (RopeScaling, LinearScaling, DynamicScaling, YarnScaling)
}
_ORIGINAL = "original_max_position_embeddings"
_MSCALES = "mscale", "mscale_all_dim"


def read_rope(config: Mapping[str, Any], longest: Any) -> tuple[float, Scaling | None]:
    """Return the base of the rotations and their scaling, as transformers reads `config.json`.

    `rope_scaling`, the older name, comes before `rope_parameters`, as a whole; `rope_theta` may be
    in it or beside it. What a type of scaling does not use is ignored, with a warning.

    Args:
        config: what the file holds.
        longest: `max_position_embeddings`, from which the original length follows where it is
            not said.

    Raises:
        ValueError: on a type that is not known, or a setting that is missing or unsound.
    """
    both = (config.get(name) for name in ("rope_scaling", "rope_parameters"))
    rope = next((value for value in both if value not in (None, {})), {})
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope is {rope!r}; expected one object")
    rope = {name: value for name, value in rope.items() if value is not None}
    beside = config.get("rope_theta")
    theta = rope.pop("rope_theta", THETA if beside is None else beside)
    older = rope.pop("type", "default")
    name = rope.pop("rope_type", older)
    partial = rope.pop("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise ValueError(f"partial_rotary_factor is {partial!r}; only whole heads are supported")
    if name != "default" and name not in list(_TYPES):  # a list has == for what cannot be hashed
        raise ValueError(f"rope is {name!r}; only default, {', '.join(_TYPES)} are supported")
    scaling = None
    if name != "default":
        kind = _TYPES[name]
        fields = {field.name: field for field in dataclasses.fields(kind)}
        try:
            settings = _completed(rope, kind, config, longest)
        except (OverflowError, ZeroDivisionError) as error:  # before its numbers are checked
            raise ValueError(
                f"rope {name!r} has numbers that cannot be used: {error}; expected positive ones"
            ) from error
        missing = [f for f, field in fields.items() if f not in settings and _needed(field)]
        if missing:
            raise ValueError(f"rope {name!r} lacks {', '.join(missing)}")
        scaling = kind(**{f: sound(fields[f], v) for f, v in settings.items() if f in fields})
        rope = {f: v for f, v in rope.items() if f not in fields and f not in _MSCALES}
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise ValueError(f"rope has {', '.join(rope)}; only one rope for all layers is supported")
    if rope:
        warnings.warn(
            f"rope {name!r} has {files.brief(', '.join(rope))}, which it does not use: ignored, "
            "as transformers does",
            stacklevel=2,
        )
    return theta, scaling


def write_rope(scaling: Scaling | None) -> dict[str, Any] | None:
    """Return `rope_scaling`, in the form that every version of transformers reads.

    Args:
        scaling: the scaling of rotations, or None.
    """
    if scaling is None:
        return None
    fields = dataclasses.asdict(scaling)
    fields.pop("max_position_embeddings", None)  # config.json has it elsewhere
    return {"rope_type": scaling.rope_type, **fields}


def _needed(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING


def _completed(
    rope: Mapping[str, Any], kind: type, config: Mapping[str, Any], longest: Any
) -> dict[str, Any]:
    """Return the settings with those that follow from others."""
    if kind is DynamicScaling:
        return {**rope, "max_position_embeddings": longest}
    if kind is LinearScaling:
        return dict(rope)
    # One beside the object comes first, the longest text last.
    original = config.get(_ORIGINAL) or rope.get(_ORIGINAL) or longest
    settings = {**rope, _ORIGINAL: original}
    if kind is YarnScaling:
        for name in ("beta_fast", "beta_slow"):
            if not settings.get(name):
                settings.pop(name, None)
        numbers = {name: settings[name] for name in ("factor", *_MSCALES) if name in settings}
        if any(type(number) not in (int, float) for number in numbers.values()):
            raise ValueError(f"rope 'yarn' has {numbers}; expected numbers")
        if type(longest) is int and type(original) is int and original > 0:
            settings.setdefault("factor", longest / original)
        if "factor" in settings:
            settings.setdefault("attention_factor", _amplitude(settings))
    return settings


def _amplitude(settings: Mapping[str, Any]) -> float:
    """Return the factor of cosines and sines of the paper, or the ratio of two such."""

    def amplitude(multiple: float) -> float:
        factor = settings["factor"]
        return 1.0 if factor <= 1 else 0.1 * multiple * math.log(factor) + 1

    first, second = map(settings.get, _MSCALES)
    return amplitude(first) / amplitude(second) if first and second else amplitude(1.0)


def inverse_frequencies(
    head_dim: int, theta: float, scaling: Scaling | None, length: Length = 1
) -> Any:
    """Return θ^(−2i/d) for each pair of coordinates, (head_dim / 2,), scaled.

    Args:
        head_dim: width d of a head.
        theta: base θ of the frequencies.
        scaling: how the frequencies are changed.
        length: length of the text, on which dynamic scaling depends; may be traced.

    Returns:
        float64 constants; with a traced length a traced array.

    Examples:
        >>> inverse_frequencies(4, 100.0, None)
        array([1. , 0.1])
        >>> inverse_frequencies(4, 100.0, LinearScaling(2.0))
        array([0.5 , 0.05])
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    return frequencies if scaling is None else scaling.scaled(frequencies, theta, length)


def rotation(positions: Int[Array, "*rows length"], frequencies: Any, amplitude: float) -> Rotation:
    """Return cosines and sines of the angles at some positions, times an amplitude, in float32.

    Args:
        positions: positions of the tokens.
        frequencies: angle per position for each pair of coordinates.
        amplitude: factor of cosines and sines.
    """
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return amplitude * jnp.cos(angles), amplitude * jnp.sin(angles)


def rotate(
    x: Float[Array, "batch length heads head_dim"], rotation: Rotation
) -> Float[Array, "batch length heads head_dim"]:
    """Return x with the pairs (x_i, x_{i + head_dim/2}) rotated, in float32.

    Args:
        x: queries or keys.
        rotation: cosines and sines, as `rotation` returns them.
    """
    cos, sin = (part[..., None, :] for part in rotation)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
