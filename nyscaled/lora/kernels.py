"""Kernels, plain or quantized, and the starts that are drawn from them."""

from __future__ import annotations

import functools
import hashlib
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key

from nyscaled import validation
from nyscaled.lora.axes import Split, to_matrices
from nyscaled.lora.inits import KERNEL_INITS, Init, Start


def path_key(key: Key[Array, ""], path: str) -> Key[Array, ""]:
    """The key of the layer at `path`: the same whichever other layers there are, in any process.

    Args:
        key: a PRNG key.
        path: the path of a layer in its model, with dots.
    """
    digest = hashlib.sha256(path.encode()).digest()
    return jax.random.fold_in(key, int.from_bytes(digest[:4], "big"))


def dense(kernel: Any, path: str) -> jax.Array:
    """The values of a kernel: of a variable or array, dequantized if qwix quantized it.

    Raises:
        ValueError: on a kernel of another kind, or of integers.
    """
    if is_quantized(kernel):
        import qwix

        return qwix.dequantize(nnx.as_pure(kernel.array))
    value = kernel[...] if isinstance(kernel, nnx.Variable) else kernel
    if not hasattr(value, "dtype") or not jnp.issubdtype(value.dtype, jnp.floating):
        kind = getattr(value, "dtype", type(value).__name__)
        raise ValueError(
            f"the kernel of {path} is {kind}; expected a floating array or one quantized by qwix: "
            "a start needs the kernel's values, dequantize it first"
        )
    return value


def is_quantized(kernel: Any) -> bool:
    """Whether qwix quantized the kernel."""
    return hasattr(getattr(kernel, "array", None), "qvalue")


def resolve(init: str | Init) -> Init:
    """The init of that name; functions pass through.

    Raises:
        ValueError: on an unknown name.
    """
    if callable(init):
        return init
    if init not in KERNEL_INITS:
        raise ValueError(
            f"init is {init!r}; expected one of {', '.join(map(repr, KERNEL_INITS))}, or from "
            "gradients, by `initialize`, 'nora_grad' or 'lora_one'"
        )
    return KERNEL_INITS[init]


class Drawn(NamedTuple):
    """An adapter's factors, and the same once more if their product is to be subtracted.

    Shapes are a (stack…, batch…, in, r), b (stack…, batch…, r, out).
    """

    a: Float[Array, "*shape"]
    b: Float[Array, "*shape"]
    subtracted: Start | None


def draw(
    key: Key[Array, ""],
    kernel: Float[Array, "*shape"],
    *,
    init: Init,
    rank: int,
    scaling: float,
    parts: Split,
    depth: int,
    options: tuple[tuple[str, Any], ...],
    dtype: Any,
) -> Drawn:
    """What `init` draws for every matrix of a kernel, with `depth` stacked axes in front.

    One layer after another, each in a call that ends before the next begins: inside one call XLA
    would hold the whole stack once more (in float32, if it is bfloat16).
    """
    stack = kernel.shape[:depth]
    of_layer = functools.partial(
        _draw, init=init, rank=rank, scaling=scaling, parts=parts, options=options, dtype=dtype
    )
    if not stack:
        return of_layer(key, kernel, ())
    keys = jax.random.split(key, stack)
    drawn = []
    for index in np.ndindex(stack):
        drawn.append(of_layer(keys[index], kernel, index))
        if validation.is_concrete(drawn[-1]):
            jax.block_until_ready(drawn[-1])
    return jax.tree.map(lambda *x: jnp.stack(x).reshape((*stack, *x[0].shape)), *drawn)


@functools.partial(
    jax.jit, static_argnames=("init", "rank", "scaling", "parts", "options", "dtype")
)
def _draw(
    key: Key[Array, ""],
    kernel: Float[Array, "*shape"],
    index: tuple[Any, ...],
    *,
    init: Init,
    rank: int,
    scaling: float,
    parts: Split,
    options: tuple[tuple[str, Any], ...],
    dtype: Any,
) -> Drawn:
    """`draw` for the layer at an index of the stack; its batch axes (experts) are several matrices."""

    def of_matrix(key: Array, matrix: Array) -> Drawn:
        a, b = (
            None if x is None else x.astype(dtype)
            for x in init(key, matrix, rank, scaling, **dict(options))
        )
        m, n = matrix.shape
        subtracted = None if a is None or b is None else Start(a, b)
        a = jnp.zeros((m, rank), dtype) if a is None else a
        b = jnp.zeros((rank, n), dtype) if b is None else b
        return Drawn(a, b, subtracted)

    matrices = to_matrices(kernel[index], parts, 0)
    batch = matrices.shape[:-2]
    if not batch:
        return of_matrix(key, matrices)
    flat = matrices.reshape((-1, *matrices.shape[-2:]))
    drawn = jax.lax.map(lambda args: of_matrix(*args), (jax.random.split(key, len(flat)), flat))
    return jax.tree.map(lambda x: x.reshape((*batch, *x.shape[1:])), drawn)


def require_finite(drawn: dict[str, Drawn]) -> None:
    """Raises ValueError if known factors have NaN or Inf entries; it names their layers."""
    if not validation.is_concrete(drawn):
        return
    sums = {path: jnp.sum(d.a) + jnp.sum(d.b) for path, d in drawn.items()}
    bad = [path for path, value in jax.device_get(sums).items() if not math.isfinite(value)]
    if bad:
        raise ValueError(
            f"the start of {', '.join(bad)} has NaN or Inf entries; expected kernels that are finite"
        )


def names_like(kernel: Any, parts: Split, depth: int) -> tuple[Any, Any] | None:
    """Axis names of the mesh for a and b that go with the kernel's; None if it has none.

    A flattened side takes the name of its first axis; the rank is not sharded.
    """
    sharding = _sharding(kernel)
    if sharding is None:
        return None
    ndim = depth + sum(map(len, parts))
    names = (*sharding.spec, *(None,) * (ndim - len(sharding.spec)))
    leading = (*names[:depth], *(names[depth + i] for i in parts.batch))
    rows, columns = (
        next((names[depth + i] for i in axes), None) for axes in (parts.inputs, parts.outputs)
    )
    return (*leading, rows, None), (*leading, None, columns)


def _sharding(kernel: Any) -> NamedSharding | None:
    value = kernel[...] if isinstance(kernel, nnx.Variable) else kernel
    sharding = getattr(value, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def place(drawn: Drawn, kernel: Any, parts: Split, depth: int) -> Drawn:
    """The factors on the kernel's mesh."""
    names, sharding = names_like(kernel, parts, depth), _sharding(kernel)
    if names is None or sharding is None:
        return drawn
    a, b = (NamedSharding(sharding.mesh, PartitionSpec(*n)) for n in names)
    pair = None if drawn.subtracted is None else Start(a, b)  # pyright: ignore[reportArgumentType]
    return jax.device_put(drawn, Drawn(a, b, pair))  # pyright: ignore[reportArgumentType]
