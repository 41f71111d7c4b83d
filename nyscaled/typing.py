"""Protocols and aliases that every room shares, and `Factors`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, ArrayLike, Float, Num

Matrix = Float[Array, "m n"]
Scalar = Float[Array, ""]

Number = float | Num[Array, ""]
"""A Python number, or an array of no axes, which may be traced."""

Values = ArrayLike | Sequence[Number]
"""A vector (k,): an array, or a sequence of numbers."""

Sketch = Literal["gaussian", "stiefel"]
"""How Ω is drawn: Gaussian entries, or a uniform orthonormal frame."""


class Factors(NamedTuple):
    """The two thin factors of `X Yᵀ`, problem (4): `left` is X (m, r), `right` is Y (n, r)."""

    left: Float[Array, "m r"]
    right: Float[Array, "n r"]


@runtime_checkable
class LinearMap(Protocol):
    """What the iterations ask of A: products with thin matrices from either side.

    A dense array, a `jax.experimental.sparse.BCOO` and `nyscaled.linalg.Operator` all qualify.
    `nyscaled.matrices.as_matrix` is what decides on others.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...

    @property
    def T(self) -> Any: ...

    def __matmul__(self, other: Any) -> Any: ...


Params = Any
"""A point of a problem: an array X (m, r), or `Factors`."""


@runtime_checkable
class Step(Protocol):
    """An iteration as pure functions of a state; the step is a pytree that holds the problem.

    `update` of the steps in `nyscaled.solvers` is compiled, with the step as an argument. Under
    `jax.jit(step.update)` the matrix would be a constant of the program.
    """

    def init(self, params: Params) -> Any:
        """Return the state at the start; ValueError if `params` do not fit the problem."""
        ...

    def update(self, state: Any) -> Any:
        """Return the state after one more iteration."""
        ...

    def params(self, state: Any) -> Params:
        """Return the factors, in the caller's coordinates."""
        ...

    def status(self, state: Any) -> ArrayLike:
        """Return `Status.MAX_STEPS`, or with which `Status` a run has to end here."""
        ...
