"""How an adapter is made: the recipe, and the weights that it draws from a kernel."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key

from nyscaled import validation
from nyscaled.lora.inits import KERNEL_INITS, Init
from nyscaled.lora.view import KernelView, Layer, kernel_of, sharding_of, values_of, view_of
from nyscaled.numerics import at_least_float32

Options = tuple[tuple[str, Any], ...]
"""The options of an init, sorted by name."""


class Weights(NamedTuple):
    """The arrays of an adapter.

    Attributes:
        a: (stack…, batch…, in, r).
        b: (stack…, batch…, r, out).
        start: a and b once more if their product is to be subtracted, or None. They are copies,
            since a and b may be donated to a training step.
    """

    a: Float[Array, "*shape"]
    b: Float[Array, "*shape"]
    start: tuple[Array, Array] | None = None


class Origin(NamedTuple):
    """Where the weights of an adapter came from.

    Attributes:
        init: the name of the init and its options.
        key: the words of the PRNG key.
    """

    init: tuple[str, Options]
    key: Array | tuple[int, ...]


def origin_of(init: str | Init, options: Mapping[str, Any], key: Key[Array, ""]) -> Origin:
    """Return the record of weights that an init has drawn.

    Args:
        init: name of the init, or the function.
        options: options of the init.
        key: the PRNG key from which the keys of the layers were folded.
    """
    name = init if isinstance(init, str) else getattr(init, "__name__", repr(init))
    return Origin((name, options_of(options)), jax.random.key_data(key))


def options_of(options: Mapping[str, object]) -> Options:
    """Return the options of an init, sorted by name, with numbers in place of scalar arrays.

    Args:
        options: values by name, which become part of a model's structure and of saved files.

    Examples:
        >>> options_of({"side": "input", "scale": jnp.float32(0.5)})
        (('scale', 0.5), ('side', 'input'))
    """
    arrays = jax.Array, np.ndarray, np.generic
    return tuple(
        (name, value.item() if isinstance(value, arrays) and value.ndim == 0 else value)
        for name, value in sorted(options.items())
    )


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How an adapter is made.

    Attributes:
        init: the function that draws factors from a kernel.
        options: options of the init.
        rank: r.
        alpha: α.
        rank_stabilized: whether the scaling is α/√r in place of α/r.
        dtype: dtype of the factors.
    """

    init: Init
    options: Options
    rank: int
    alpha: float
    rank_stabilized: bool
    dtype: Any

    @property
    def scaling(self) -> float:
        """s, by which the product of the factors is multiplied."""
        return scaling_of(self.alpha, self.rank, self.rank_stabilized)

    def draw(
        self, key: Key[Array, ""], kernel: Float[Array, "*shape"], view: KernelView
    ) -> Weights:
        """Return what the init draws for every matrix of a kernel.

        Layers of a stack are drawn one at a time, each in a call that ends before the next begins.
        Inside one call XLA would hold a second copy of the whole stack (in float32, if the kernel
        is bfloat16).
        """
        if not view.stack:
            return _draw(key, kernel, (), recipe=self, view=view)
        keys = jax.random.split(key, view.stack)
        layers = []
        for index in np.ndindex(view.stack):
            layers.append(_draw(keys[index], kernel, index, recipe=self, view=view.unstacked))
            if validation.is_concrete(layers[-1]):
                jax.block_until_ready(layers[-1])
        return jax.tree.map(lambda *x: jnp.stack(x).reshape((*view.stack, *x[0].shape)), *layers)

    def draw_for(self, layer: Layer, path: str, key: Key[Array, ""]) -> Weights:
        """Return what the init draws from a layer's kernel, placed as the kernel is."""
        view, kernel = view_of(layer), kernel_of(layer)
        weights = self.draw(path_key(key, path), values_of(kernel, path), view)
        return place(weights, kernel, view)


@functools.partial(jax.jit, static_argnames=("recipe", "view"))
def _draw(
    key: Key[Array, ""],
    kernel: Float[Array, "*shape"],
    index: tuple[Any, ...],
    *,
    recipe: Recipe,
    view: KernelView,
) -> Weights:
    """Weights for the layer at an index of the stack; batch axes (experts) are several matrices."""

    def of_matrix(key: Array, matrix: Array) -> Weights:
        options = dict(recipe.options)
        a, b = (
            None if x is None else x.astype(recipe.dtype)
            for x in recipe.init(key, matrix, recipe.rank, recipe.scaling, **options)
        )
        m, n = matrix.shape
        start = None if a is None or b is None else (a, b)
        a = jnp.zeros((m, recipe.rank), recipe.dtype) if a is None else a
        b = jnp.zeros((recipe.rank, n), recipe.dtype) if b is None else b
        return Weights(a, b, start)

    matrices = view.to_matrices(kernel[index])
    if not view.batch:
        return of_matrix(key, matrices)
    flat = matrices.reshape((-1, *matrices.shape[-2:]))
    weights = jax.lax.map(lambda args: of_matrix(*args), (jax.random.split(key, len(flat)), flat))
    return jax.tree.map(lambda x: x.reshape((*view.batch, *x.shape[1:])), weights)


def kernel_init(init: str | Init) -> Init:
    """Return the init of that name; functions are returned as they are.

    Raises:
        ValueError: on an unknown name.
    """
    if callable(init):
        return init
    if init not in KERNEL_INITS:
        raise ValueError(
            f"init is {init!r}; expected one of {', '.join(map(repr, KERNEL_INITS))}, or, by "
            "`initialize`, 'nora_grad' or 'lora_one' (from gradients) or 'eva' (from inputs)"
        )
    return KERNEL_INITS[init]


def scaling_of(alpha: float, rank: int, rank_stabilized: bool) -> float:
    """Return s = α/r, or α/√r if rank-stabilized.

    Args:
        alpha: α.
        rank: r.
        rank_stabilized: whether s is α/√r.
    """
    return float(alpha) / (rank**0.5 if rank_stabilized else rank)


def path_key(key: Key[Array, ""], path: str) -> Key[Array, ""]:
    """Return the key of a layer. It depends on no other layer and is the same in any process.

    Args:
        key: a PRNG key.
        path: the path of a layer in its model, with dots.

    Examples:
        >>> first, second = (path_key(jax.random.key(0), f"layers.{i}") for i in range(2))
        >>> bool(jnp.all(jax.random.key_data(first) == jax.random.key_data(second)))
        False
    """
    digest = hashlib.sha256(path.encode()).digest()
    return jax.random.fold_in(key, int.from_bytes(digest[:4], "big"))


@jax.jit
def _looked_at(a: Array, b: Array) -> tuple[Array, Array]:
    """A sum that is finite if all entries are, and whether each pair has others than 0."""
    total = jnp.sum(at_least_float32(a)) + jnp.sum(at_least_float32(b))
    return total, jnp.all(jnp.any(a != 0, axis=(-2, -1)) | jnp.any(b != 0, axis=(-2, -1)))


def require_trainable(weights: Mapping[str, Weights]) -> None:
    """Raise ValueError if known factors are not finite, or both are zero; it names their layers."""
    if not validation.is_concrete(weights):
        return
    known = jax.device_get({path: _looked_at(w.a, w.b) for path, w in weights.items()})
    if bad := [path for path, (total, _) in known.items() if not math.isfinite(total)]:
        raise ValueError(
            f"the start of {', '.join(bad)} has NaN or Inf entries; expected kernels that are "
            "finite"
        )
    if dead := [path for path, (_, alive) in known.items() if not alive]:
        raise ValueError(
            f"the start of {', '.join(dead)} has two zero factors, which no gradient changes; "
            "expected kernels that are not zero (init 'lora' starts from any kernel)"
        )


def place(weights: Weights, kernel: Any, view: KernelView) -> Weights:
    """Return the weights on the mesh of their kernel.

    Args:
        weights: the arrays of an adapter.
        kernel: the variable or array that holds W_0.
        view: how the kernel is read.
    """
    names, sharding = view.factor_names(kernel), sharding_of(kernel)
    if names is None or sharding is None:
        return weights
    a, b = (NamedSharding(sharding.mesh, PartitionSpec(*n)) for n in names)
    start = None if weights.start is None else (a, b)
    return jax.device_put(weights, Weights(a, b, start))  # pyright: ignore[reportArgumentType]
