"""Trainable tokens: some rows of the embedding are learned, e.g. those of new special tokens; the table is not.

    row of token adapter.tokens[i] = rows[i]      rows [tokens, embed], at first what the table has

A tied model's head reads them too. PEFT has the method as TRAINABLE_TOKENS.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ...configs.sections.adapter import AdapterConfig
from ...configs.sections.model import ModelConfig
from ..decoder import Params
from .interface import AddedModule, Leaves


class TrainableTokens(nnx.Module):
    """Rows in the place of the table's; which, is `numbers` [tokens] int32."""

    def __init__(self, leaves: Leaves):
        self.rows, self.numbers = nnx.Param(leaves["rows"]), nnx.Param(leaves["numbers"])

    def __call__(self, tokens: jax.Array, x: jax.Array) -> jax.Array:
        """x [batch, sequence, embed], the table's rows of `tokens` [batch, sequence], with our own among them."""
        found = tokens[..., None] == self.numbers[...]
        own = jnp.take(self.rows[...], jnp.argmax(found, axis=-1), axis=0)
        return jnp.where(found.any(axis=-1, keepdims=True), own.astype(x.dtype), x)

    def table(self, embedding: jax.Array) -> jax.Array:
        """The whole table [padded_vocab, embed]."""
        return embedding.at[self.numbers[...]].set(self.rows[...].astype(embedding.dtype))


def init(weights: Params, model: ModelConfig, adapter: AdapterConfig, key: jax.Array) -> dict[str, Leaves]:
    """The table's own rows."""
    del model, key
    numbers = jnp.asarray(np.array(adapter.tokens, np.int32))
    rows = jnp.take(weights["embed"]["embedding"], numbers, axis=0).astype(jnp.float32)
    return {"embed/adapter": {"rows": rows, "numbers": numbers}}


def merge(tree: Params, adapter: AdapterConfig) -> Params:
    """The plain weights, the rows in the table."""
    del adapter
    embed = dict(tree["embed"])
    own = TrainableTokens(embed.pop("adapter"))
    return tree | {"embed": embed | {"embedding": own.table(embed["embedding"])}}


TOKENS = AddedModule(init, TrainableTokens, trained_suffixes=("/embed/adapter/rows",), merge=merge)
