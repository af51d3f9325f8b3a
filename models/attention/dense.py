"""`dense`: attention as it is defined, all scores at once. The reference the other implementations are tested against.

Memory grows with queries x keys. All arithmetic is float32, so that it shows the rounding errors of the others.
"""

import jax
import jax.numpy as jnp

from . import tile
from .interface import Implementation, Mask, TokenIndices, never_refuse


def forward(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, indices: TokenIndices) -> tuple[jax.Array, jax.Array]:
    """out like q, and lse [batch, queries, heads]."""
    queries, kv_heads = q.shape[1], k.shape[2]
    q_tile, k_tile, v_tile = (tile.to_tile(x.astype(jnp.float32), kv_heads) for x in (q, k, v))
    masked = tile.apply_visibility(tile.scores(q_tile, k_tile, mask), _visible(q, k, mask, indices))
    maximum = jnp.max(masked, axis=-1)
    weights = jnp.exp(masked - tile.finite(maximum)[..., None])
    total = jnp.sum(weights, axis=-1)
    out = jnp.einsum("bhqk,bhkd->bhqd", weights, v_tile) / jnp.where(total > 0, total, 1.0)[..., None]
    lse = tile.log_sum_exp(maximum, total)
    return tile.from_tile(out, queries).astype(q.dtype), tile.statistics_from_tile(lse, queries)


def backward(q, k, v, out, lse, d_out, mask: Mask, indices: TokenIndices) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk, dv like q, k, v, for these keys of a softmax with the given `out` and `lse` over all keys."""
    queries, kv_heads = q.shape[1], k.shape[2]
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    dq, dk, dv = tile.tile_gradients(
        *(tile.to_tile(x.astype(jnp.float32), kv_heads) for x in (q, k, v)),
        tile.statistics_to_tile(lse, kv_heads),
        tile.statistics_to_tile(delta, kv_heads),
        tile.to_tile(d_out.astype(jnp.float32), kv_heads),
        _visible(q, k, mask, indices),
        mask,
    )
    dq, dk, dv = tile.from_tile(dq, queries), tile.keys_from_tile(dk), tile.keys_from_tile(dv)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _visible(q, k, mask: Mask, indices: TokenIndices):
    query_index = jnp.arange(q.shape[1]) if indices.query_index is None else indices.query_index
    key_index = jnp.arange(k.shape[1]) if indices.key_index is None else indices.key_index
    return tile.visibility(mask, query_index, key_index, indices.query_segments, indices.key_segments)


DENSE = Implementation("dense", never_refuse, forward, backward)
