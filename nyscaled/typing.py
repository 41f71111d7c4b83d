"""Types shared by every room: array aliases, `Factors`, and dataclasses as pytrees."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, NamedTuple, Protocol, TypeVar, dataclass_transform, runtime_checkable

import jax
from jaxtyping import Array, ArrayLike, Float

Matrix = Float[Array, "m n"]
Scalar = Float[Array, ""]

T = TypeVar("T")


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


def static_field(**kwargs: Any) -> Any:
    """A dataclass field that is part of the structure (hashable), not a leaf."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(static_field,))
def pytree_dataclass(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen dataclass that is a pytree; fields with metadata `static` are not leaves.

    Unlike `jax.tree_util.register_dataclass`, rebuilding one from its leaves does not call the
    constructor, so that a constructor may validate what a user gives it: inside jax
    transformations the leaves are tracers or placeholders, already validated.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    data = tuple(f.name for f in fields if not f.metadata.get("static"))
    static = tuple(f.name for f in fields if f.metadata.get("static"))

    def flatten_with_keys(node: T):
        children = tuple((jax.tree_util.GetAttrKey(name), getattr(node, name)) for name in data)
        return children, tuple(getattr(node, name) for name in static)

    def flatten(node: T):
        return tuple(getattr(node, name) for name in data), tuple(getattr(node, s) for s in static)

    def unflatten(meta: tuple[Any, ...], leaves: Any) -> T:
        return build(cls, **dict(zip((*data, *static), (*leaves, *meta), strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def build(cls: type[T], **fields: Any) -> T:
    """A frozen dataclass of these fields, without a call of its constructor, which would check them."""
    node = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(node, name, value)
    return node


def as_partial(fn: Any) -> jax.tree_util.Partial:
    """`fn` as a pytree: arrays bound in it are traced arguments, so that equal shapes share a compilation.

    A method of a pytree (`problem.loss`) is split into function and object; a plain function
    becomes a node without leaves, compared by identity.
    """
    if isinstance(fn, jax.tree_util.Partial):
        return fn
    if inspect.ismethod(fn) and not jax.tree_util.all_leaves([fn.__self__]):
        return jax.tree_util.Partial(fn.__func__, fn.__self__)
    return jax.tree_util.Partial(fn)
