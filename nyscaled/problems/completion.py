"""Matrix completion: a low-rank matrix from some of its entries, as sensing by `Entries`.

𝒜 reads the entries of a set Ω and multiplies them by √(m n / |Ω|), so that on random sets it keeps
norms on average and step sizes are those of problems (1) and (4). XYᵀ is formed only at Ω: a step
costs O(|Ω| r). It consists of gathers and scatters, which are slow: on a CPU a dense masked product
is faster once 2 to 4 % of the entries are seen (benchmarks/problems.py).

If Ω misses a whole principal submatrix, for example one entry of the diagonal, and X has more
columns than the rank of M, the loss does not determine it: ZZᵀ with Z supported there leaves every
observed entry unchanged.

References:
    Candès, Recht, Exact matrix completion via convex optimization, FoCM 2009. Tong, Ma, Chi,
    Accelerating ill-conditioned low-rank matrix estimation via scaled gradient descent, JMLR 2021
    (the scaled projection).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.sparse import BCOO
from jaxtyping import Array, Float, Key

from nyscaled import validation
from nyscaled._pytree import field, pytree_dataclass
from nyscaled.matrices import as_array
from nyscaled.numerics import clipped, full_precision, normalized, root, shift
from nyscaled.operators import as_shape
from nyscaled.problems._points import both
from nyscaled.problems.sensing import Sensing
from nyscaled.typing import Factors, Scalar

__all__ = [
    "Entries",
    "bernoulli",
    "observed",
    "project_incoherent",
]


@pytree_dataclass
class Entries:
    """𝒜(M)ₖ = √(m n / p) · M[rowsₖ, columnsₖ], a `MeasurementMap`.

    Args:
        rows: (p,) integers in [0, m).
        columns: (p,) integers in [0, n). An entry that is listed twice counts twice.
        shape: (m, n).
        dtype: float32 or float64, of the matrices measured.

    Raises:
        ValueError: on indices that do not go together or (outside of jit) are out of range.
    """

    rows: Array = field(converter=functools.partial(as_array, "rows"))
    columns: Array = field(converter=functools.partial(as_array, "columns"))
    shape: tuple[int, int] = field(static=True)
    dtype: Any = field(static=True, converter=jnp.dtype, default=jnp.dtype("float32"))

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", as_shape("the matrix", self.shape))
        rows, columns = self.rows, self.columns
        if rows.ndim != 1 or rows.shape != columns.shape or rows.size == 0:
            raise ValueError(
                f"rows {rows.shape} and columns {columns.shape} do not go together; expected (p,) "
                "both"
            )
        for name, indices, side in zip(
            ("rows", "columns"), (rows, columns), self.shape, strict=True
        ):
            if not jnp.issubdtype(indices.dtype, jnp.integer):
                raise ValueError(f"{name} have dtype {indices.dtype}; expected integers")
            if validation.is_concrete(indices):
                low, high = int(jnp.min(indices)), int(jnp.max(indices))
                if low < 0 or high >= side:
                    raise ValueError(f"{name} are {low} … {high}; expected 0 … {side - 1}")
            if indices.dtype.itemsize < 4:  # these hold the indices, and may not hold m and n
                object.__setattr__(self, name, indices.astype(jnp.int32))

    @property
    def count(self) -> int:
        """The number p = |Ω| of measurements."""
        return self.rows.shape[0]

    @property
    def scale(self) -> float:
        """The factor √(m n / p) of the map."""
        return (self.shape[0] * self.shape[1] / self.count) ** 0.5

    def forward(self, left: Float[Array, "m r"], right: Float[Array, "n r"]) -> Float[Array, " p"]:
        """Return 𝒜(LRᵀ), in O(p r)."""
        return self.scale * jnp.sum(left[self.rows] * right[self.columns], axis=1)

    def adjoint(self, weights: Float[Array, " p"]) -> BCOO:
        """Return 𝒜*(w), a sparse (m, n)."""
        indices = jnp.stack([self.rows, self.columns], axis=1)
        return BCOO((self.scale * weights, indices), shape=self.shape)


def observed(rows: Any, columns: Any, values: Any, shape: tuple[int, int]) -> Sensing:
    """Return the problem of finding M (m, n) of low rank with M[rows, columns] = values.

    f = ¼ mn/p Σ (XXᵀ − M)² over the p entries at X (m, r), ½ mn/p Σ (XYᵀ − M)² at `Factors`.

    Args:
        rows: (p,) integers.
        columns: (p,) integers.
        values: (p,), float32 or float64.
        shape: (m, n).

    Returns:
        A `Sensing` whose map is `Entries`.

    Raises:
        ValueError: as `Entries` and `Sensing` do.

    Examples:
        >>> problem = observed([0, 1, 1], [0, 0, 1], jnp.array([1.0, 2.0, 4.0]), shape=(2, 2))
        >>> problem.loss(jnp.array([[1.0], [2.0]]))
        Array(0., dtype=float32)
    """
    values = as_array("values", values)
    validation.require_floating("values", values)
    entries = Entries(rows, columns, shape, values.dtype)
    return Sensing(entries, entries.scale * values)


def bernoulli(
    key: Key[Array, ""], factors: Factors | Float[Array, "m r"], probability: float
) -> Sensing:
    """Return the problem of M = XXᵀ or XYᵀ, of which each entry is seen with some probability.

    How many are seen depends on the key, so this cannot be compiled; `observed` can.

    Args:
        key: PRNG key of Ω.
        factors: X (m, r) or `Factors`; an optimum of the problem.
        probability: in (0, 1].

    Raises:
        ValueError: on a probability outside (0, 1], and if no entry is seen.

    Examples:
        >>> problem = bernoulli(jax.random.key(0), jnp.ones((20, 1)), probability=0.5)
        >>> problem.shape, 150 < problem.map.count < 250
        ((20, 20), True)
    """
    validation.require_scalar("probability", probability, 0, 1, open_low=True)
    left, right = both(factors)
    seen = jax.random.bernoulli(key, probability, (len(left), len(right)))
    rows, columns = jnp.nonzero(seen)
    values = jnp.sum(left[rows] * right[columns], axis=1)
    return observed(rows, columns, values, (len(left), len(right)))


@full_precision
def project_incoherent(
    factors: Factors | Float[Array, "m r"], bound: float | Scalar
) -> Factors | Float[Array, "m r"]:
    """Return factors whose rows are shortened until √m·‖xᵢYᵀ‖ ≤ bound (the scaled projection).

    xᵢ ← min(1, bound / (√m ‖xᵢYᵀ‖)) xᵢ and yⱼ ← min(1, bound / (√n ‖yⱼXᵀ‖)) yⱼ, both with the
    factors before the change. For a single X, Y = X. This is the projection, in the norm of the
    preconditioner, onto factors whose product spreads over all rows, as completion needs.

    Args:
        factors: X (m, r) or `Factors`.
        bound: B > 0; (1 + slack)·√(μ r)·‖M‖ for a μ-incoherent M.

    Raises:
        ValueError: on a bound that is not positive.

    Examples:
        >>> x = project_incoherent(jnp.array([[3.0], [0.1]]), bound=1.0)
        >>> bool(jnp.abs(x[1, 0] - 0.1) < 1e-6), bool(x[0, 0] < 0.3)
        (True, True)
    """
    validation.require_positive("bound", bound)

    def shorten(x: Array, y: Array) -> Array:
        # ‖xᵢYᵀ‖² = xᵢ(YᵀY)xᵢᵀ, without the m×n product.
        (unit_x, e_x), (unit_y, e_y) = normalized(x), normalized(y)
        squares = jnp.sum((unit_x @ (unit_y.T @ unit_y)) * unit_x, axis=1)
        lengths = shift(root(len(x) * clipped(squares, 0, jnp.inf)), e_x + e_y)
        limit = jnp.asarray(bound, x.dtype)
        return x * clipped(limit / jnp.where(lengths > 0, lengths, limit), 0, 1)[:, None]

    left, right = both(factors)
    if isinstance(factors, Factors):
        return Factors(shorten(left, right), shorten(right, left))
    return shorten(left, right)
