"""Prefix tuning: every layer learns keys and values that precede every document. Source: arXiv:2101.00190.

    attention over [prefix k; k], [prefix v; v]      prefix k, v [length, kv_heads, head_dim] in every layer

They start as the keys and values that the model computes for `length` tokens drawn at random (section 7.4: better than
random numbers), and are learned without the paper's reparametrization. They are already rotated: the positions of the
document's tokens follow theirs.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from ...configs.sections.adapter import AdapterConfig
from ...configs.sections.model import ModelConfig
from ..context import Context
from ..decoder import Params, decoder_graphdef
from .interface import AddedModule, LeafModule, Leaves
from .prompt import sample_embeddings


class Prefix(LeafModule):
    """Keys and values of one layer."""

    def __call__(self, x: jax.Array, ctx: Context) -> tuple[Leaves, Callable[..., jax.Array]]:
        """(keys and values to prepend, the attention to use); x [batch, sequence, embed] is the attention's input."""
        del x
        return {"k": self.k[...], "v": self.v[...]}, ctx.attend


def init(weights: Params, model: ModelConfig, adapter: AdapterConfig, key: jax.Array) -> dict[str, Leaves]:
    """Leaves [layers, length, kv_heads, head_dim] of every stack."""
    decoder = nnx.merge(decoder_graphdef(model), weights)
    rows = sample_embeddings(weights, model, adapter, key)
    entries = decoder.keys_and_values(rows, Context(positions=jnp.zeros((1, 1), jnp.int32)))
    return {
        f"segments/{segment}/{position}/block/attn/prefix": leaves
        for segment, stacks in entries.items()
        for position, leaves in enumerate(stacks)
    }


PREFIX = AddedModule(init, Prefix, trained_suffixes=("/attn/prefix/k", "/attn/prefix/v"), is_prefix=True)
