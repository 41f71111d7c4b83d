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

MatrixLike = Any
"""A: a NumPy or JAX array, a sparse matrix of SciPy or JAX, or a `linalg.Operator`."""

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
class MeasurementMap(Protocol):
    """What sensing asks of its linear map 𝒜; a pytree, such as `problems.sensing.Matrices`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (m, n) of the matrices that are measured."""
        ...

    @property
    def count(self) -> int:
        """The number p of measurements."""
        ...

    @property
    def dtype(self) -> Any: ...

    def forward(self, left: Array, right: Array) -> Array:
        """Return 𝒜(LRᵀ) (p,) of factors L (m, r) and R (n, r)."""
        ...

    def adjoint(self, weights: Array) -> LinearMap:
        """Return 𝒜*(w) = Σᵢ wᵢAᵢ (m, n) of weights (p,): anything with `@` and `.T`."""
        ...


@runtime_checkable
class Objective(Protocol):
    """What `solvers.gradient_step` asks of a problem, which is a pytree of arrays.

    It also calls two methods where a problem has them. `factor_size()` is about the norm of the
    factors of a solution: growth far beyond it ends a run as DIVERGED. `root_loss(params)` is the
    root of the loss, which neither overflows nor underflows.
    """

    def loss(self, params: Params, /) -> Scalar:
        """Return the loss at a point."""
        ...

    def gradient(self, params: Params, /) -> Params:
        """Return the gradient of the loss, in the form of the point."""
        ...

    def check(self, params: Any, /) -> Params:
        """Return `params` as a point of this problem; ValueError if it cannot be one."""
        ...


@runtime_checkable
class Problem(Objective, Protocol):
    """A loss of the product of thin factors, which should approximate a matrix.

    `tests/test_contracts_problems.py` holds all that every problem meets.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (m, n) of the matrix."""
        ...

    @property
    def dtype(self) -> Any:
        """The dtype of points: float32 or float64."""
        ...

    @property
    def symmetric(self) -> bool:
        """Whether a point must be one factor X, for XXᵀ, in place of `Factors`."""
        ...

    def target(self) -> LinearMap:
        """Return the matrix (m, n) that the product should be, or the best that is known of it.

        It is minus the gradient of the loss in the product, at zero. Starts are made of it.
        """
        ...


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
