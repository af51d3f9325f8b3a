"""Prefix tuning: every layer has learned keys and values in front of every document. Source: arXiv:2101.00190.

    attention over [prefix k; k], [prefix v; v]      prefix k, v [length, kv_heads, head_dim] in every layer

They start as what the model itself makes of `length` tokens, drawn at random (section 7.4: better than random numbers),
and are learned without the paper's reparametrization. Rotations are in them: tokens count their positions after them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from ...configs.sections.adapter import AdapterConfig
from ...configs.sections.model import ModelConfig
from ..context import Context
from ..decoder import Params, decoder_graphdef
from .interface import AddedModule, Leaves
from .prompt import sample_embeddings


class Prefix(nnx.Module):
    """Keys and values of one layer."""

    def __init__(self, leaves: Leaves):
        self.k, self.v = nnx.Param(leaves["k"]), nnx.Param(leaves["v"])

    def __call__(self, x: jax.Array, ctx: Context) -> tuple[Leaves, Callable[..., jax.Array]]:
        """What attention, which reads x [batch, sequence, embed], puts in front of its own, and how it attends then."""
        del x
        return {"k": self.k[...], "v": self.v[...]}, ctx.attend


def init(weights: Params, model: ModelConfig, adapter: AdapterConfig, key: jax.Array) -> dict[str, Leaves]:
    """Leaves [layers, length, kv_heads, head_dim] of every stack."""
    decoder = nnx.merge(decoder_graphdef(model), weights)
    entries = decoder.keys_and_values(
        sample_embeddings(weights, model, adapter, key), Context(positions=jnp.zeros((1, 1), jnp.int32))
    )
    return {
        f"segments/{segment}/{place}/block/attn/prefix": own
        for segment, places in entries.items()
        for place, own in enumerate(places)
    }


PREFIX = AddedModule(init, Prefix, trained_suffixes=("/attn/prefix/k", "/attn/prefix/v"), is_prefix=True)
