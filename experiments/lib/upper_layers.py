"""The upper layers of a causal language model, above states that the lower ones gave once.

Where adapters are in the upper layers, the states below are the same in all steps and runs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from nyscaled.finetune.batches import Batch, Batches
from nyscaled.finetune.order import NONE, Rows
from nyscaled.models.cache import run_causal
from nyscaled.models.causal import CausalLM
from nyscaled.models.gated import GatedDecoder


class Unchanged(nnx.Module):
    """Takes the place of the last norm of the lower layers."""

    def __call__(self, x: Array) -> Array:
        return x


class Upper(CausalLM):
    """Upper layers, norm and head of a decoder; reads states in place of tokens.

    Args:
        model: the decoder, with these layers only.
    """

    def __init__(self, model: GatedDecoder) -> None:
        self.model, self.config, self.numerics = model, model.config, model.numerics

    def hidden(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        tokens: Float[Array | np.ndarray, "batch length width"],
        mask: Bool[Array | np.ndarray, "batch length"],
    ) -> tuple[Float[Array, "batch length width"], None]:
        """Return what the head reads.

        Args:
            tokens: states that the layer below gave, at padding too.
            mask: True at tokens.
        """
        model, mask = self.model, jnp.asarray(mask)
        rotation = model._rotation(tokens.shape[1], mask, None)  # pyright: ignore[reportPrivateUsage]
        x, _ = run_causal(
            model.layers, jnp.asarray(tokens), mask, None, rotation, remat=self.numerics.remat
        )
        return model.norm(x), None

    def logits(self, x: Float[Array, "... width"]) -> Float[Array, "... vocab"]:
        """Return the logits of hidden states.

        Args:
            x: hidden states.
        """
        return self.model.logits(x)


def halves(model: GatedDecoder, upper: int) -> tuple[GatedDecoder, Upper]:
    """Return the lower layers of a decoder, whose `hidden` gives states, and the upper ones.

    Args:
        model: the decoder, which does not change.
        upper: number of upper layers.

    Raises:
        ValueError: unless that leaves a layer on either side, in which all tokens are seen.
    """
    layers = model.config.num_hidden_layers
    if not 0 < upper < layers or model.config.windows is not None:
        raise ValueError(
            f"upper is {upper} of {layers} layers, windows {model.config.windows}; expected 1 to "
            f"{layers - 1}, and layers without windows"
        )

    def part(chosen: slice) -> GatedDecoder:
        graphdef, state = nnx.split(model.layers)
        own = nnx.clone(model)
        own.layers = nnx.merge(graphdef, jax.tree.map(lambda x: jnp.array(x[chosen]), state))
        count = len(range(layers)[chosen])
        own.config = dataclasses.replace(model.config, num_hidden_layers=count)
        return own

    lower = part(slice(layers - upper))
    lower.norm = Unchanged()  # pyright: ignore[reportAttributeAccessIssue]
    return lower, Upper(part(slice(layers - upper, layers)))


@dataclasses.dataclass(frozen=True)
class Cached(Batches):
    """Batches with states in the place of tokens.

    Attributes:
        states: states of each example's row, (tokens, width).
    """

    states: tuple[np.ndarray, ...] = ()

    def batch(self, examples: Rows, among: Rows | None = None) -> Batch:
        """See `Batches.batch`.

        Args:
            examples: as there.
            among: as there.
        """
        batch = super().batch(examples, among)
        values = np.zeros((*batch.tokens.shape, self.states[0].shape[1]), np.float32)
        for row, example in zip(values, examples, strict=True):
            if example != NONE:
                own = self.states[example]
                row[: len(own)] = own
        return batch._replace(tokens=values)


@nnx.jit
def _states(lower: GatedDecoder, tokens: Any, mask: Any) -> Array:
    return lower.hidden(tokens, mask)[0]


def with_states(plain: Batches, lower: GatedDecoder, batch_size: int) -> Cached:
    """Return batches of states.

    Args:
        plain: batches of tokens, with a row for each example.
        lower: the lower layers.
        batch_size: examples that are computed together.
    """
    states: dict[int, np.ndarray] = {}
    for examples, batch in plain.sorted(batch_size):
        values = np.asarray(_states(lower, batch.tokens, batch.mask), np.float32)
        for example, value, mask in zip(examples, values, batch.mask, strict=True):
            if example != NONE:
                states[int(example)] = value[: int(np.sum(mask))].copy()
    fields = {f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)}
    return Cached(**fields, states=tuple(states[i] for i in range(len(plain))))
