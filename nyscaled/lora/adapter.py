"""The adapter of a layer, and layers that carry adapters.

A layer is adapted in place: its class becomes one that adds s·x·a·b to what its own class
computes. Paths, names and types of the base stay what they were, and no copy of W_0 is made. The
base is never written to: an init whose product a·b is not zero (PiSSA, OLoRA) leaves its start
beside the trained factors, to be subtracted in the forward pass. So adapters of every init serve
together from one W_0 (Appendix A.3), and the output at step 0 is the base's to the last bit.
"""

from __future__ import annotations

import copyreg
import functools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from nyscaled.lora.contraction import Contraction
from nyscaled.lora.recipe import Origin, Weights, path_key, scaling_of
from nyscaled.lora.view import (
    Layer,
    MeshNames,
    equations,
    kernel_of,
    unstacked_view,
    view_of,
)
from nyscaled.numerics import at_least_float32
from nyscaled.transforms.leaf_names import Shape


class AdapterState(nnx.Variable[Any]):
    """What an adapter keeps and does not train."""


class Adapter(nnx.Module):
    """One low-rank update s·a·b of a layer.

    Attributes:
        lora_a: (stack…, batch…, in, r), trained.
        lora_b: (stack…, batch…, r, out), trained.
        start: `a` and `b`, shaped like these, whose product is subtracted; or None.
        gate: 1 if active and 0 if not, (stack…); or a weight per row of the batch, (stack…, rows).
        key: data of the PRNG key that the start was drawn with, (stack…, words).
        dropout: dropout of the input, or None.
        stack: lengths of the leading axes that `nnx.scan` consumes.
        scaling: s, α/r or α/√r.
        alpha: α.
        rank_stabilized: whether s is α/√r.
        init: name of the init and its options; saved with the adapter.
        merged: whether the kernel holds the update already.
        measures: whether it reads the inputs of its layer, as `input_moments` does, in place of
            adding to the output.
    """

    measures = False

    def __init__(
        self,
        weights: Weights,
        origin: Origin,
        *,
        stack: Shape = (),
        alpha: float,
        rank_stabilized: bool = False,
        dropout: nnx.Dropout | None = None,
        names: tuple[MeshNames, MeshNames] | None = None,
    ) -> None:
        metadata: list[dict[str, Any]] = [{"out_sharding": n} for n in names or ()] or [{}, {}]
        self.lora_a = nnx.LoRAParam(weights.a, **metadata[0])
        self.lora_b = nnx.LoRAParam(weights.b, **metadata[1])
        self.stack = stack
        self._record(weights, origin)
        self.gate = AdapterState(jnp.ones(stack))
        self.dropout = nnx.data(dropout)
        self.alpha = float(alpha)
        self.rank_stabilized = rank_stabilized
        self.scaling = scaling_of(self.alpha, weights.a.shape[-1], rank_stabilized)
        self.merged = False

    @property
    def rank(self) -> int:
        """r."""
        return self.lora_a.shape[-1]

    def restart(self, weights: Weights, origin: Origin) -> None:
        """Replace the factors, in place, and the record of where they came from."""
        self.lora_a[...], self.lora_b[...] = weights.a, weights.b
        self._record(weights, origin)

    def _record(self, weights: Weights, origin: Origin) -> None:
        self.start: Any = nnx.data(None)
        if weights.start is not None:
            a, b = (AdapterState(x) for x in weights.start)
            self.start = nnx.Dict(a=a, b=b)
        words = jnp.asarray(origin.key, jnp.uint32)
        self.key = AdapterState(jnp.broadcast_to(words, (*self.stack, *words.shape)))
        self.init = origin.init

    def product(self) -> Float[Array, "... m n"]:
        """Return s·(a·b − its start): what `merge` adds to the kernel, in float32 at least."""
        a, b = (at_least_float32(v[...]) for v in (self.lora_a, self.lora_b))
        with jax.default_matmul_precision("highest"):
            value = a @ b
            if self.start is not None:
                first, second = (at_least_float32(self.start[side][...]) for side in "ab")
                value = value - first @ second
        return self.scaling * value

    def __call__(self, x: Array, contraction: Contraction) -> Array:
        """Return s·x·a·b for an input x of the layer, in the contraction's dtype."""
        if self.measures:
            return input_moments(x, self.lora_a[...], contraction)
        tokens = not contraction.equations.down  # without dropout, as in PEFT
        dropped = x if self.dropout is None or tokens else self.dropout(x)
        out = self._through(dropped, self.lora_a, self.lora_b, contraction)
        if self.start is None:
            return out
        return out - self._through(x, self.start["a"], self.start["b"], contraction)

    def _through(self, x: Array, a: Any, b: Any, c: Contraction) -> Array:
        dtype = c.dtype or a.dtype
        hidden = c.down(x, a[...].astype(dtype))
        gate = (self.scaling * self.gate[...]).astype(dtype)
        if gate.ndim:
            count = hidden.shape[0] if hidden.ndim > 1 else 0
            if count != gate.size:
                raise ValueError(
                    f"the input has {count} rows; expected {gate.size}, as `rows` of "
                    "`nys.lora.activate`"
                )
            gate = gate.reshape(-1, *(1,) * (hidden.ndim - 1))
        return c.up(gate * hidden, b[...].astype(dtype))


def input_moments(x: Array, a: Array, contraction: Contraction) -> Array:
    """Return zeros like the layer's output, whose gradient in a is Σ xᵀx·a over the inputs x.

    Inputs on which the loss does not depend, such as those at padding, are left out: the gradient
    in their output is zero.

    Args:
        x: input of the layer.
        a: a factor (batch…, in, k) with any k.
        contraction: what is known of the call.
    """
    a = at_least_float32(a)
    c = contraction._replace(precision="highest")

    def sums(hidden: Array) -> Array:
        """Sums over the columns of a, at each output."""
        ones = jnp.ones((*c.batch, a.shape[-1], math.prod(c.outputs)), hidden.dtype)
        return c.up(hidden, ones)

    @jax.custom_vjp
    def zeros(x: Array, a: Array) -> Array:
        return jnp.zeros_like(sums(c.down(x, a)))

    def forward(x: Array, a: Array) -> tuple[Array, tuple[Array, Array]]:
        return zeros(x, a), (x, a)

    def backward(inputs: tuple[Array, Array], gradient: Array) -> tuple[None, Array]:
        hidden, to_a = jax.vjp(functools.partial(c.down, inputs[0]), inputs[1])
        sizes = jax.vjp(sums, hidden)[1](jnp.abs(gradient))[0]
        return None, to_a(jnp.where(sizes > 0, hidden, 0))[0]

    zeros.defvjp(forward, backward)
    return zeros(x, a)


def make_adapter(
    path: str,
    layer: Layer,
    weights: Weights,
    origin: Origin,
    *,
    alpha: float,
    rank_stabilized: bool,
    dropout: nnx.Dropout | None,
) -> Adapter:
    """Return an adapter for a layer.

    Args:
        path: path of the layer, for messages.
        layer: the layer.
        weights: the adapter's arrays.
        origin: where these came from.
        alpha: α.
        rank_stabilized: whether the scaling is α/√r.
        dropout: dropout of the input, or None.

    Raises:
        ValueError: on a scaling that the dtype of the layer's products cannot hold.
    """
    view, kernel = view_of(layer), kernel_of(layer)
    # The kernel's own metadata: factors of a kernel without such are placed, and not annotated.
    annotated = isinstance(kernel, nnx.Variable) and kernel.get_metadata().get("out_sharding")
    adapter = Adapter(
        weights,
        origin,
        stack=view.stack,
        alpha=alpha,
        rank_stabilized=rank_stabilized,
        dropout=dropout,
        names=view.factor_names(kernel) if annotated else None,
    )
    narrow = jnp.dtype(layer.dtype or weights.a.dtype)
    if abs(adapter.scaling) > float(jnp.finfo(narrow).max):
        raise ValueError(
            f"{path}: the scaling is {adapter.scaling:g} (α is {alpha:g}); expected one that "
            f"{narrow} holds, in which the layer computes"
        )
    return adapter


def dropout_of(
    rate: float, key: Key[Array, ""] | None, path: str, stack: Shape
) -> nnx.Dropout | None:
    """Return the dropout of a layer's adapter; each layer of a stack has its own stream.

    Args:
        rate: rate of the dropout; None is returned for 0.
        key: PRNG key, from which that of the layer is folded; None is returned for None.
        path: path of the layer.
        stack: lengths of the axes of the layer's stack.
    """
    if not rate or key is None:
        return None
    key = path_key(key, f"{path}.dropout")

    def make(key: Key[Array, ""]) -> nnx.Dropout:
        return nnx.Dropout(rate, rngs=nnx.Rngs(dropout=key))

    for _ in stack:
        make = nnx.vmap(make)
    return make(jax.random.split(key, stack) if stack else key)


class Adapted(nnx.Module):
    """The class that `apply` mixes into that of a layer: it adds the updates of its adapters."""

    adapters: nnx.Dict[Any]
    kernel: Any
    dtype: Any
    precision: Any

    def __call__(self, inputs: Array, *args: Any, **kwargs: Any) -> Array:
        base: Any = super()
        y = base.__call__(inputs, *args, **kwargs)
        layer = cast(Layer, self)  # its class is a subclass of that of a layer too
        if isinstance(layer, nnx.Einsum):
            equation = args[0] if args else kwargs.get("einsum_str")
            if equation and equation.replace(" ", "") != layer.einsum_str:
                raise ValueError(
                    f"the layer is called with the equation {equation!r}; expected "
                    f"{layer.einsum_str!r}, for which its adapters were made"
                )
        view = unstacked_view(layer)
        contraction = Contraction(
            equations(layer, inputs.ndim),
            view.batch,
            view.inputs,
            view.outputs,
            dtype=self.dtype,
            # The layer's, if it names one: full float32 costs the thin products little.
            precision=getattr(self, "precision", None) or "highest",
            out_sharding=kwargs.get("out_sharding"),
        )
        for adapter in self.adapters.values():
            if not adapter.merged:
                y = y + adapter(inputs, contraction).astype(y.dtype)
        return y


@functools.cache
def adapted_class(base: type[nnx.Module]) -> type[nnx.Module]:
    """Return the subclass of a layer's class that carries adapters.

    It is one object per class, which the caches of jit require. No module defines it: it is pickled
    as the call that makes it. Its name in this module keeps cloudpickle from copying the class.
    """
    name = f"LoRA{base.__name__}"
    unique = f"{name}_of_{base.__module__}.{base.__qualname__}".replace(".", "_")
    fields = {"__module__": __name__, "__qualname__": unique, "base_class": base}
    made = _adapted_meta(type(base))(name, (Adapted, base), fields)
    globals()[unique] = made
    return made


def _reduced(made: Any) -> tuple[Any, ...]:
    return adapted_class, (made.base_class,)


@functools.cache
def _adapted_meta(meta: Any) -> Any:
    """A metaclass of its own, as pickle asks for the reducer of a class by its metaclass."""
    made = type(f"Adapted{meta.__name__}", (meta,), {"__module__": __name__})
    copyreg.pickle(made, _reduced)
    return made
