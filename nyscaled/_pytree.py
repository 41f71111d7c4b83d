"""Dataclasses and functions as pytrees, so that what they hold is an argument of compiled code."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

import jax

T = TypeVar("T")


def field(
    *, static: bool = False, converter: Callable[[Any], Any] | None = None, **kwargs: Any
) -> Any:
    """Return a field of a `pytree_dataclass`.

    Args:
        static: whether the field is part of the structure, and hashable, in place of a leaf.
        converter: a function that the constructor applies to what it is given for this field.
        **kwargs: passed to `dataclasses.field`, such as `default`.
    """
    return dataclasses.field(metadata={"static": static, "converter": converter}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def pytree_dataclass(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass that is a pytree, of which static fields are not leaves.

    Unlike `jax.tree_util.register_dataclass`, rebuilding one from its leaves does not call the
    constructor, so that a constructor may convert and check what a user gives it: inside jax
    transformations the leaves are tracers or placeholders, which were checked before.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    data = tuple(f.name for f in fields if not f.metadata.get("static"))
    static = tuple(f.name for f in fields if f.metadata.get("static"))
    converters = {f.name: f.metadata["converter"] for f in fields if f.metadata.get("converter")}
    if converters:
        _convert_first(cls, converters)

    def flatten_with_keys(node: T):
        children = tuple((jax.tree_util.GetAttrKey(name), getattr(node, name)) for name in data)
        return children, tuple(getattr(node, name) for name in static)

    def flatten(node: T):
        return tuple(getattr(node, name) for name in data), tuple(getattr(node, s) for s in static)

    def unflatten(meta: tuple[Any, ...], leaves: Any) -> T:
        return build(cls, **dict(zip((*data, *static), (*leaves, *meta), strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def _convert_first(cls: Any, converters: dict[str, Callable[[Any], Any]]) -> None:
    """Make the constructor of `cls` apply the converters to its arguments."""
    init = cls.__init__
    signature = inspect.signature(init)

    @functools.wraps(init)
    def converting(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        for name, converter in converters.items():
            bound.arguments[name] = converter(bound.arguments[name])
        init(*bound.args, **bound.kwargs)

    cls.__init__ = converting


def build(cls: type[T], **fields: Any) -> T:
    """Return a frozen dataclass of these fields, which its constructor does not check."""
    node = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(node, name, value)
    return node


def as_partial(fn: Callable[..., Any]) -> jax.tree_util.Partial:
    """Return `fn` as a pytree, so that functions which differ in their arrays share a compilation.

    A method of a pytree (`problem.loss`) is split into function and object. A plain function
    becomes a node without leaves, which is compared by identity.
    """
    if isinstance(fn, jax.tree_util.Partial):
        return fn
    if inspect.ismethod(fn) and not jax.tree_util.all_leaves([fn.__self__]):
        return jax.tree_util.Partial(fn.__func__, fn.__self__)
    return jax.tree_util.Partial(fn)
