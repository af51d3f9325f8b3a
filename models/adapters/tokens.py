"""Trainable tokens: some rows of the embedding are trained, e.g. those of new special tokens, and the table is not.

    embedding of token adapter.tokens[i] = rows[i]      rows [tokens, embed] start as the table's rows

The head of a tied model reads them too. PEFT calls the method TRAINABLE_TOKENS.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ...configs.sections.adapter import AdapterConfig
from ...configs.sections.model import ModelConfig
from ..decoder import Params
from .interface import AddedModule, LeafModule, Leaves


class TrainableTokens(LeafModule):
    """`rows` [tokens, embed] that replace the table's rows at `numbers` [tokens] int32."""

    def __call__(self, tokens: jax.Array, x: jax.Array) -> jax.Array:
        """x [batch, sequence, embed], the table's rows at `tokens` [batch, sequence], with trained rows put in."""
        is_trained = tokens[..., None] == self.numbers[...]  # [batch, sequence, trained tokens]
        rows = jnp.take(self.rows[...], jnp.argmax(is_trained, axis=-1), axis=0)
        return jnp.where(is_trained.any(axis=-1, keepdims=True), rows.astype(x.dtype), x)

    def table(self, embedding: jax.Array) -> jax.Array:
        """The table `embedding` [padded_vocab, embed] with trained rows put in."""
        return embedding.at[self.numbers[...]].set(self.rows[...].astype(embedding.dtype))


def init(weights: Params, model: ModelConfig, adapter: AdapterConfig, key: jax.Array) -> dict[str, Leaves]:
    """The rows as the table has them."""
    del model, key
    numbers = jnp.asarray(np.array(adapter.tokens, np.int32))
    rows = jnp.take(weights["embed"]["embedding"], numbers, axis=0).astype(jnp.float32)
    return {"embed/adapter": {"rows": rows, "numbers": numbers}}


def merge(tree: Params, adapter: AdapterConfig) -> Params:
    """The plain weights, with the trained rows in the table."""
    del adapter
    embed = dict(tree["embed"])
    trained = TrainableTokens(embed.pop("adapter"))
    return tree | {"embed": embed | {"embedding": trained.table(embed["embedding"])}}


TOKENS = AddedModule(init, TrainableTokens, trained_suffixes=("/embed/adapter/rows",), merge=merge)
