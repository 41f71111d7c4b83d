"""The adapter of a layer, and layers that carry adapters.

A layer is adapted in place: its class becomes one that adds s·x·a·b to what its own class
computes, so that paths, names and types of the base stay what they were, and no copy of W_0 is
made. The base is never written to: an init whose product a·b is not zero (PiSSA, OLoRA) leaves
its start beside the trained factors, to be subtracted in the forward pass. This is what lets
adapters of every kind serve together from one W_0 (Appendix A.3), and makes the output at step 0
the base's to the last bit.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from nyscaled.lora.axes import Equations, declared_shape, equations, split


class Contraction(NamedTuple):
    """What an adapter must know of its layer's call."""

    equations: Equations
    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    dtype: Any
    precision: Any
    out_sharding: Any


class AdapterState(nnx.Variable):
    """What an adapter keeps and does not train."""


class Adapter(nnx.Module):
    """One low-rank update s·a·b of a layer.

    Attributes:
        lora_a: (stack…, batch…, in, r), trained.
        lora_b: (stack…, batch…, r, out), trained.
        start: `a` and `b`, shaped like these, whose product is subtracted; or None.
        gate: 1 if active and 0 if not, (stack…); or one weight a row of the batch, (stack…, rows).
        key: data of the PRNG key that the start was drawn with, (stack…, words).
        dropout: of the input, or None.
        stack: lengths of the leading axes that `nnx.scan` consumes.
        scaling: s, α/r or α/√r.
        alpha: α.
        rank_stabilized: whether s is α/√r.
        init: name of the init and its options, for the record that is saved with the adapter.
        merged: whether the kernel holds the update already.
    """

    def __init__(
        self,
        lora_a: Float[Array, "... m r"],
        lora_b: Float[Array, "... r n"],
        *,
        stack: tuple[int, ...] = (),
        alpha: float,
        rank_stabilized: bool = False,
        dropout: nnx.Dropout | None = None,
        names: tuple[Any, Any] | None = None,
    ) -> None:
        metadata = [{"out_sharding": n} if n else {} for n in names or (None, None)]
        self.lora_a = nnx.LoRAParam(lora_a, **metadata[0])
        self.lora_b = nnx.LoRAParam(lora_b, **metadata[1])
        self.start: Any = nnx.data(None)
        self.gate = AdapterState(jnp.ones(stack))
        self.key = AdapterState(jnp.zeros((*stack, 2), jnp.uint32))
        self.dropout = nnx.data(dropout)
        self.stack = stack
        self.alpha = float(alpha)
        self.rank_stabilized = rank_stabilized
        self.scaling = scaling_of(self.alpha, lora_a.shape[-1], rank_stabilized)
        self.init: tuple[str, tuple[tuple[str, Any], ...]] = ("zeros", ())
        self.merged = False

    @property
    def rank(self) -> int:
        """r."""
        return self.lora_a.shape[-1]

    def restart(self, drawn: Any, key: Any, init: Any, options: Mapping[str, Any]) -> None:
        """Writes a start into the factors, and the record of where it came from."""
        self.lora_a[...], self.lora_b[...] = drawn.a, drawn.b
        self.start = nnx.data(None)
        if drawn.subtracted is not None:
            a, b = (AdapterState(x) for x in drawn.subtracted)
            self.start = nnx.Dict(a=a, b=b)
        words = jax.random.key_data(key)
        self.key = AdapterState(jnp.broadcast_to(words, (*self.stack, *words.shape)))
        name = init if isinstance(init, str) else getattr(init, "__name__", repr(init))
        self.init = (name, tuple(sorted(options.items())))

    def product(self) -> Float[Array, "... m n"]:
        """s·a·b, less its start: what is added to the kernel, in float32 at least."""
        a, b = (_wide(v[...]) for v in (self.lora_a, self.lora_b))
        with jax.default_matmul_precision("highest"):
            value = a @ b
            if self.start is not None:
                value = value - _wide(self.start["a"][...]) @ _wide(self.start["b"][...])
        return self.scaling * value

    def __call__(self, x: Array, contraction: Contraction) -> Array:
        """s·x·a·b for an input x of the layer, in the contraction's dtype."""
        tokens = not contraction.equations.down  # without dropout, as in PEFT
        dropped = x if self.dropout is None or tokens else self.dropout(x)
        out = self._through(dropped, self.lora_a, self.lora_b, contraction)
        if self.start is None:
            return out
        return out - self._through(x, self.start["a"], self.start["b"], contraction)

    def _through(self, x: Array, a: Any, b: Any, c: Contraction) -> Array:
        dtype = c.dtype or a.dtype
        down = a[...].astype(dtype).reshape((*c.batch, *c.inputs, self.rank))
        up = b[...].astype(dtype).reshape((*c.batch, self.rank, *c.outputs))
        if c.equations.down:
            hidden = jnp.einsum(c.equations.down, x.astype(dtype), down, precision=c.precision)
        else:
            hidden = jnp.take(down, x, axis=0)
        gate = (self.scaling * self.gate[...]).astype(dtype)
        if gate.ndim:
            gate = gate.reshape(-1, *(1,) * (hidden.ndim - 1))
        return jnp.einsum(
            c.equations.up, gate * hidden, up, precision=c.precision, out_sharding=c.out_sharding
        )


def scaling_of(alpha: float, rank: int, rank_stabilized: bool) -> float:
    """s = α/r, or α/√r."""
    return float(alpha) / (rank**0.5 if rank_stabilized else rank)


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class Adapted(nnx.Module):
    """What `apply` mixes into the class of a layer: the sum over its adapters."""

    adapters: nnx.Dict
    kernel: Any
    dtype: Any
    precision: Any

    def __call__(self, inputs: Array, *args: Any, **kwargs: Any) -> Array:
        base: Any = super()
        y = base.__call__(inputs, *args, **kwargs)
        lengths, parts = declared_shape(self), split(self)
        contraction = Contraction(
            equations(self, inputs.ndim),
            *(tuple(lengths[i] for i in axes) for axes in parts),
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
    """The subclass of a layer's class that carries adapters; one object a class, as jit caches want.

    No module defines it: it is pickled as the call that makes it. The name in this module tells
    cloudpickle that the class is not one to be copied.
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
