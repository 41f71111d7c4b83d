"""What the causal language models share: calls, the head, and its tie to the embedding."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from nyscaled.models.blocks import Mask, Numerics, Tokens
from nyscaled.models.cache import Cache
from nyscaled.models.family import LanguageModel
from nyscaled.numerics import full_precision


class CausalLM(LanguageModel):
    """A model that gives the logits of the next token; subclasses have `hidden`.

    Attributes:
        numerics: dtypes, and whether layers are computed again in the backward pass.
        embed_tokens: the embedding.
        lm_head: the head, unless it is the embedding (`config.tie_word_embeddings`).
    """

    numerics: Numerics
    embed_tokens: nnx.Embed
    lm_head: nnx.Linear

    def __call__(
        self,
        tokens: Tokens,
        mask: Mask | None = None,
    ) -> Float[Array, "batch length vocab"]:
        """Return the logits of the next token at each position, in the compute dtype.

        Args:
            tokens: ids below `vocab_size`, (batch, length). Other ids give NaN, except at padding.
            mask: True (or 1) where there is a token and False where there is padding, on either
                side; None for no padding. Logits at padding have no meaning.

        Raises:
            ValueError: unless tokens are integers (batch, length), no longer than the table of
                positions where the model has one, and the mask has their shape.
        """
        return self.logits(self.hidden(tokens, mask)[0])

    def hidden(
        self,
        tokens: Tokens,
        mask: Mask | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "batch length width"], Cache | None]:
        """Return what the head reads, and the cache with these tokens.

        Args:
            tokens: as in a call. With a cache, the tokens that follow those in it.
            mask: as in a call.
            cache: result of `new_cache` or of an earlier call, with room for the tokens. The room
                is not checked where its length is traced.
        """
        raise NotImplementedError

    @full_precision
    def logits(self, x: Float[Array, "... width"]) -> Float[Array, "... vocab"]:
        """Return the logits of hidden states.

        Args:
            x: hidden states.
        """
        tied = self.config.tie_word_embeddings
        return self.embed_tokens.attend(x) if tied else self.lm_head(x)

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """Return an empty cache in the compute dtype.

        Args:
            batch: number of rows.
            capacity: number of tokens for which a row has room.
        """
        config, heads = self.config, self._cached_heads
        shape = (config.num_hidden_layers, batch, capacity, *heads)
        return Cache.empty(shape, self.numerics.dtypes["dtype"])

    @property
    def _cached_heads(self) -> tuple[int, int]:
        """Number and width of the heads of keys and values."""
        raise NotImplementedError

    @property
    def max_length(self) -> int | None:
        """Most tokens in a row, None for no limit."""
        return None

    def untie(self, head: nnx.Linear | None = None) -> None:
        """Give the head weights of its own, equal to the embedding's; do nothing if it has them.

        Adapters can then be put on `lm_head`, and the embedding be trained without it.

        Args:
            head: head to use instead of a new one.
        """
        if self.config.tie_word_embeddings:
            self.lm_head = self.new_head() if head is None else head
            self.config = dataclasses.replace(self.config, tie_word_embeddings=False)

    def new_head(self) -> nnx.Linear:
        """Return a linear layer that computes what `embed_tokens.attend` does."""
        embed = self.embed_tokens
        head = nnx.eval_shape(
            lambda: nnx.Linear(
                embed.features, embed.num_embeddings, use_bias=False, dtype=embed.dtype,
                param_dtype=embed.param_dtype, rngs=nnx.Rngs(0),
            )
        )  # fmt: skip
        head.kernel = nnx.Param(jnp.array(embed.embedding[...].T))
        return head
