"""Phase retrieval and other quadratic measurements, bᵢ = aᵢᵀ M aᵢ, as sensing by `RankOne`.

With M = xxᵀ these are the squares of ⟨aᵢ, x⟩, whose signs are lost.

References:
    Candès, Li, Soltanolkotabi, Phase retrieval via Wirtinger flow, IEEE Trans. Inf. Theory 2015
    (complex; here the real case).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Key

from nyscaled import linalg, validation
from nyscaled._pytree import field, pytree_dataclass
from nyscaled.matrices import as_array, transpose_times
from nyscaled.numerics import full_precision
from nyscaled.problems import sensing
from nyscaled.spectra import random_factor
from nyscaled.typing import Number, Values

__all__ = [
    "RankOne",
    "gaussian",
]


@pytree_dataclass
class RankOne:
    """𝒜(M)ᵢ = aᵢᵀ M aᵢ, a `MeasurementMap` in O(p m r): no matrix m×m is formed.

    Args:
        vectors: aᵢ, stacked, (p, m), float32 or float64. Unlike that of Gaussian matrices, the map
            of Gaussian vectors N(0, I) sees the trace: E‖𝒜(M)‖² = p (2‖M‖_F² + tr(M)²). Divided
            by p^¼ they require step sizes about a third of those of `sensing.gaussian` at rank one.

    Raises:
        ValueError: on an array that is not finite, floating and of two axes.

    Examples:
        >>> from nyscaled.problems import Sensing
        >>> vectors, x = jnp.array([[1.0, 0.0], [1.0, 1.0]]), jnp.array([[2.0], [-3.0]])
        >>> Sensing(RankOne(vectors), jnp.array([4.0, 1.0])).loss(x)
        Array(0., dtype=float32)
    """

    vectors: Array = field(
        converter=functools.partial(as_array, "the array of measurement vectors")
    )

    def __post_init__(self) -> None:
        vectors = self.vectors
        if vectors.ndim != 2 or vectors.size == 0:
            raise ValueError(f"measurement vectors have shape {vectors.shape}; expected (p, m)")
        validation.require_floating("the array of measurement vectors", vectors)
        validation.require_finite("the array of measurement vectors", vectors)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (m, m) of the matrices measured."""
        return self.vectors.shape[1], self.vectors.shape[1]

    @property
    def count(self) -> int:
        """The number p of measurements."""
        return self.vectors.shape[0]

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype, float32 or float64."""
        return self.vectors.dtype

    @full_precision
    def forward(self, left: Float[Array, "m r"], right: Float[Array, "m r"]) -> Float[Array, " p"]:
        """Return 𝒜(LRᵀ)."""
        return jnp.sum((self.vectors @ left) * (self.vectors @ right), axis=1)

    def adjoint(self, weights: Float[Array, " p"]) -> linalg.Operator:
        """Return 𝒜*(w) = Σᵢ wᵢaᵢaᵢᵀ, known by its products."""
        product = Partial(_weighted_gram, self.vectors, weights)
        return linalg.Operator(product, product, self.shape, self.dtype)


@full_precision
def _weighted_gram(vectors: Array, weights: Array, x: Array) -> Array:
    return transpose_times(vectors, weights[:, None] * (vectors @ x))


def gaussian(
    key: Key[Array, ""], m: int, spectrum: Values, num_measurements: int, noise: Number = 0.0
) -> tuple[sensing.Sensing, Float[Array, "m k"]]:
    """Return quadratic measurements of a random M; phase retrieval if M has one eigenvalue.

    aᵢ has entries N(0, 1), divided by p^¼, and bᵢ = aᵢᵀMaᵢ + N(0, noise²/p): noise of standard
    deviation `noise` on undivided vectors. The loss at the truth is about noise²/4.

    Args:
        key: PRNG key of M, 𝒜 and the noise.
        m: side of M.
        spectrum: the k ≤ m positive eigenvalues of M.
        num_measurements: p ≥ 1; a few times m k distinguish M from other matrices of low rank.
        noise: σ ≥ 0; may be traced.

    Returns:
        A `Sensing` whose map is `RankOne`, and X* (m, k) with M = X*X*ᵀ, in JAX's default float.

    Raises:
        ValueError: on a bad spectrum, p or σ.

    Examples:
        >>> problem, truth = gaussian(jax.random.key(0), 10, [1.0], num_measurements=60)
        >>> truth.shape, bool(problem.loss(-truth) < 1e-10)
        ((10, 1), True)
    """
    truth_key, vector_key, noise_key = jax.random.split(key, 3)
    truth = random_factor(truth_key, m, spectrum, m)
    vectors = sensing.random_array(vector_key, (num_measurements, m), truth.dtype)
    a = RankOne(vectors / num_measurements**0.25)
    return sensing.measured(noise_key, a, truth, truth, noise), truth
