"""Matrix sensing: a low-rank matrix from p linear measurements bᵢ = ⟨Aᵢ, M⟩ (+ noise).

    symmetric     min over X of ¼‖𝒜(XXᵀ) − b‖²,         𝒜(M)ᵢ = ⟨Aᵢ, M⟩
    asymmetric    min over X, Y of ½‖𝒜(XYᵀ) − b‖²

The map carries the scale: where it keeps norms on average, E‖𝒜(M)‖² = ‖M‖_F², as that of
`gaussian` does, the losses are those of problems (1) and (4) in expectation, and so are step sizes.

References:
    Zhang, Fattahi, Zhang, Preconditioned gradient descent for overparameterized nonconvex
    Burer-Monteiro factorization with global optimality certification, JMLR 2023.
    Tong, Ma, Chi, Accelerating ill-conditioned low-rank matrix estimation via scaled gradient
    descent, JMLR 2021.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from nyscaled import linalg, validation
from nyscaled._pytree import field, pytree_dataclass
from nyscaled.matrices import as_array, transpose_times
from nyscaled.numerics import full_precision, norm, normalized, shift
from nyscaled.operators import require_traced
from nyscaled.problems._points import both
from nyscaled.spectra import random_factor
from nyscaled.typing import Factors, LinearMap, MeasurementMap, Number, Params, Scalar, Values

__all__ = [
    "Matrices",
    "MeasurementMap",
    "Sensing",
    "gaussian",
    "gaussian_factors",
]


@pytree_dataclass
class Matrices:
    """𝒜 by its matrices, an array (p, m, n), float32 or float64.

    XYᵀ and 𝒜*(w) are formed, m n numbers beside the p m n that are read: each is one pass over the
    array, for any r.

    Args:
        matrices: Aᵢ, stacked, (p, m, n).

    Raises:
        ValueError: on an array that is not finite, floating and of three axes.
    """

    matrices: Array = field(
        converter=functools.partial(as_array, "the array of measurement matrices")
    )

    def __post_init__(self) -> None:
        array = self.matrices
        if array.ndim != 3 or array.size == 0:
            raise ValueError(f"measurement matrices have shape {array.shape}; expected (p, m, n)")
        validation.require_floating("the array of measurement matrices", array)
        validation.require_finite("the array of measurement matrices", array)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (m, n) of the matrices measured."""
        return self.matrices.shape[1:]

    @property
    def count(self) -> int:
        """The number p of measurements."""
        return self.matrices.shape[0]

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype, float32 or float64."""
        return self.matrices.dtype

    @full_precision
    def forward(self, left: Float[Array, "m r"], right: Float[Array, "n r"]) -> Float[Array, " p"]:
        """Return 𝒜(LRᵀ)."""
        return self.matrices.reshape(self.count, -1) @ (left @ right.T).reshape(-1)

    @full_precision
    def adjoint(self, weights: Float[Array, " p"]) -> Float[Array, "m n"]:
        """Return 𝒜*(w)."""
        return (weights @ self.matrices.reshape(self.count, -1)).reshape(self.shape)


def _as_map(measurements: Any) -> MeasurementMap:
    if isinstance(measurements, MeasurementMap):
        return measurements
    return Matrices(measurements)


@pytree_dataclass
class Sensing:
    """f(X) = ¼‖𝒜(XXᵀ) − b‖² at X (m, r); f(X, Y) = ½‖𝒜(XYᵀ) − b‖² at `Factors`.

    Args:
        map: the linear map 𝒜, a `MeasurementMap` or the array (p, m, n) of its matrices Aᵢ,
            float32 or float64. The Aᵢ need not be symmetric, also where the points are X.
        b: the measurements (p,), in the same dtype.

    Raises:
        ValueError: if b does not go with 𝒜, or values are not finite (outside of jit).

    Examples:
        >>> problem, truth = gaussian(jax.random.key(0), 20, [1.0, 0.5], num_measurements=200)
        >>> bool(problem.loss(truth) < 1e-10), problem.gradient(truth).shape
        (True, (20, 2))
    """

    map: MeasurementMap = field(converter=_as_map)
    b: Array = field(converter=functools.partial(as_array, "b"))
    symmetric = False

    def __post_init__(self) -> None:
        p, dtype = self.map.count, self.dtype
        if self.b.shape != (p,) or self.b.dtype != dtype:
            got = f"{self.b.shape} {self.b.dtype}"
            raise ValueError(f"b is {got}; expected ({p},) {dtype}, one number per measurement")
        validation.require_finite("b", self.b)
        _require_map(self.map)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (m, n) of the matrix sought."""
        return self.map.shape

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype, float32 or float64."""
        return self.map.dtype

    def misfit(self, predicted: Float[Array, " p"]) -> Scalar:
        """Return ½‖z − b‖² of predicted measurements z."""
        difference, e = normalized(predicted - self.b)
        return shift(shift(jnp.sum(difference**2) / 2, e), e)

    def root_misfit(self, predicted: Float[Array, " p"]) -> Scalar:
        """Return the root of `misfit`, where the misfit itself may overflow or underflow."""
        return norm(predicted - self.b) / 2**0.5

    def slope(self, predicted: Float[Array, " p"]) -> Float[Array, " p"]:
        """Return the derivative of `misfit`, z − b."""
        return predicted - self.b

    def loss(self, point: Params) -> Scalar:
        """Return f at X or at `Factors`: the misfit, halved for X."""
        misfit = self.misfit(self.map.forward(*both(point)))
        return misfit if isinstance(point, Factors) else misfit / 2

    def root_loss(self, point: Params) -> Scalar:
        """Return √f, where f itself may overflow or underflow."""
        root = self.root_misfit(self.map.forward(*both(point)))
        return root if isinstance(point, Factors) else root / 2**0.5

    @full_precision
    def factor_size(self) -> Scalar:
        """Return about √‖M‖_F, the size of the factors sought: ‖b‖²/‖𝒜*(b)‖_F is ‖M‖_F at most."""
        seen = self.slope(jnp.zeros_like(self.b))
        size = norm(seen)
        back = linalg.probed_norm(self.map.adjoint(seen))
        return jnp.sqrt(size * (size / jnp.where(back > 0, back, 1)))

    @full_precision
    def gradient(self, point: Params) -> Params:
        """Return ½(G + Gᵀ)X at X, (GY, GᵀX) at `Factors`, where G = 𝒜*(𝒜(·) − b)."""
        x, y = both(point)
        g = self.map.adjoint(self.slope(self.map.forward(x, y)))
        if isinstance(point, Factors):
            return Factors(g @ y, transpose_times(g, x))
        return (g @ x + transpose_times(g, x)) / 2

    def target(self) -> LinearMap:
        """Return minus the gradient in the product at zero (m, n), 𝒜*(b) for this loss.

        It is the matrix sought, on average, where 𝒜 keeps norms. Its symmetric part need not be
        positive semidefinite, as `initializers.nystrom` requires: for a start of XXᵀ there are
        `initializers.nystrom_from_gradient` and `initializers.spectral`.
        """
        return self.map.adjoint(-self.slope(jnp.zeros_like(self.b)))

    def measured_norm(self, x: Float[Array, "m r"]) -> Scalar:
        """Return ‖𝒜(XXᵀ)‖."""
        return norm(self.map.forward(x, x))

    def check(self, point: object) -> Params:
        """Return `point` as X or `Factors` of this problem; ValueError if it cannot be one."""
        if isinstance(point, Factors):
            point = validation.require_factors(point, self.shape)
        elif self.shape[0] == self.shape[1]:
            point = validation.require_factor("X", point, self.shape)
        else:
            got = type(point).__name__
            raise ValueError(f"the point is a {got}; expected Factors for a matrix {self.shape}")
        return jax.tree.map(lambda factor: jnp.asarray(factor, self.dtype), point)


def _require_map(a: MeasurementMap) -> None:
    """Raise ValueError unless 𝒜 and both products with 𝒜* have their shapes and the dtype of 𝒜."""
    (m, n), p = a.shape, a.count
    left, right, weights = (jax.ShapeDtypeStruct(s, a.dtype) for s in ((m, 2), (n, 2), (p,)))
    kind = f"{type(a).__name__}"
    require_traced(f"{kind}.forward", _forward, (a, left, right), (p,), a.dtype)
    require_traced(f"{kind}.adjoint @ x", _adjoint_times, (a, weights, right), (m, 2), a.dtype)
    require_traced(f"{kind}.adjoint.T @ y", _times_adjoint, (a, weights, left), (n, 2), a.dtype)


def _forward(a: MeasurementMap, left: Array, right: Array) -> Array:
    return a.forward(left, right)


def _adjoint_times(a: MeasurementMap, weights: Array, x: Array) -> Array:
    return a.adjoint(weights) @ x


def _times_adjoint(a: MeasurementMap, weights: Array, y: Array) -> Array:
    return transpose_times(a.adjoint(weights), y)


def gaussian(
    key: Key[Array, ""], m: int, spectrum: Values, num_measurements: int, noise: Number = 0.0
) -> tuple[Sensing, Float[Array, "m k"]]:
    """Return a symmetric problem with Gaussian measurements of a random M of given spectrum.

    Aᵢ has entries N(0, 1/p) and bᵢ = ⟨Aᵢ, M⟩ + N(0, noise²/p): a common factor 1/√p on unit
    Gaussian measurements with noise of standard deviation `noise`. The loss at the truth is
    about noise²/4.

    Args:
        key: PRNG key of M, 𝒜 and the noise.
        m: side of M.
        spectrum: the k ≤ m positive eigenvalues of M.
        num_measurements: p ≥ 1; a few times m k distinguish M from other matrices of low rank.
        noise: σ ≥ 0; may be traced.

    Returns:
        The problem and X* (m, k) with M = X*X*ᵀ, in JAX's default float.

    Raises:
        ValueError: on a bad spectrum, p or σ.

    Examples:
        >>> problem, truth = gaussian(jax.random.key(0), 20, [1.0, 0.5], num_measurements=200)
        >>> truth.shape, bool(problem.loss(truth) < 1e-9)
        ((20, 2), True)
    """
    truth_key, measurement_key = jax.random.split(key)
    truth = random_factor(truth_key, m, spectrum, m)
    return _gaussian(measurement_key, truth, truth, num_measurements, noise), truth


def gaussian_factors(
    key: Key[Array, ""],
    m: int,
    n: int,
    spectrum: Values,
    num_measurements: int,
    noise: Number = 0.0,
) -> tuple[Sensing, Factors]:
    """Return the same for a rectangular M (m, n) of given singular values, and its factors.

    Args:
        key: a PRNG key.
        m: the number of rows of M.
        n: the number of columns of M.
        spectrum: the singular values of M (k,), all positive.
        num_measurements: the number p of measurements.
        noise: the size of the errors, whose entries are N(0, noise²/p).

    Examples:
        >>> problem, truth = gaussian_factors(jax.random.key(0), 6, 5, [1.0], num_measurements=40)
        >>> problem.shape, bool(problem.loss(truth) < 1e-10)
        ((6, 5), True)
    """
    truth_key, measurement_key = jax.random.split(key)
    left, right = jax.random.split(truth_key)
    limit = min(m, n)
    truth = Factors(
        random_factor(left, m, spectrum, limit), random_factor(right, n, spectrum, limit)
    )
    return _gaussian(measurement_key, *truth, num_measurements, noise), truth


def random_array(key: Array, shape: tuple[Any, ...], dtype: Any) -> Array:
    """Return N(0, 1) entries of shape (p, …), where p is the caller's num_measurements."""
    validation.require_count("num_measurements", shape[0], 1)
    return jax.random.normal(key, shape, dtype)


def measured(key: Array, a: MeasurementMap, left: Array, right: Array, noise: Number) -> Sensing:
    """Return the problem of LRᵀ seen through 𝒜 with errors N(0, noise²/p)."""
    validation.require_nonnegative("noise", noise)
    errors = jax.random.normal(key, (a.count,), left.dtype) * (noise / a.count**0.5)
    return Sensing(a, a.forward(left, right) + errors)


def _gaussian(key: Array, left: Array, right: Array, p: int, noise: Number) -> Sensing:
    key_a, key_b = jax.random.split(key)
    matrices = random_array(key_a, (p, len(left), len(right)), left.dtype) / p**0.5
    return measured(key_b, Matrices(matrices), left, right, noise)
