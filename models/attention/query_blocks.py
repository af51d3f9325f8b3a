"""Short sequences: each block of queries against all the keys it may see, in one tile; the loop is unrolled.

On a CPU a loop in the compiled program costs more than a short sequence's arithmetic, and static slices let each block
skip the keys that are invisible to it: half of them when causal. Tokens must be in plain order, without indexes.
"""

import jax
import jax.numpy as jnp

from . import tile
from .interface import Mask, TokenIndices


def forward(q, k, v, mask: Mask, indices: TokenIndices, *, block: int) -> tuple[jax.Array, jax.Array]:
    """out like q, and lse [batch, queries, heads]; `block` queries at a time."""
    kv_heads = k.shape[2]
    k_tile, v_tile = tile.to_tile(k, kv_heads), tile.to_tile(v, kv_heads)
    outs, lses = [], []
    for queries, keys in _tiles(q.shape[1], k.shape[1], mask, block):
        masked = tile.apply_visibility(
            tile.scores(tile.to_tile(q[:, queries], kv_heads), k_tile[:, :, keys], mask),
            _visible(mask, indices, queries, keys),
        )
        maximum = jnp.max(masked, axis=-1)
        weights = jnp.exp(masked - tile.finite(maximum)[..., None])
        total = jnp.sum(weights, axis=-1)
        out = jnp.einsum(
            "bhqk,bhkd->bhqd", weights.astype(v.dtype), v_tile[:, :, keys], preferred_element_type=jnp.float32
        )
        out = out / jnp.where(total > 0, total, 1.0)[..., None]
        size = queries.stop - queries.start
        outs.append(tile.from_tile(out.astype(q.dtype), size))
        lses.append(tile.statistics_from_tile(tile.log_sum_exp(maximum, total), size))
    return jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=1)


def backward(q, k, v, out, lse, d_out, mask: Mask, indices: TokenIndices, *, block: int):
    """dq, dk, dv like q, k, v."""
    kv_heads = k.shape[2]
    k_tile, v_tile = tile.to_tile(k, kv_heads), tile.to_tile(v, kv_heads)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    dqs, keys_last = [], (*k_tile.shape[:2], k_tile.shape[3], k_tile.shape[2])
    dk, dv = jnp.zeros(keys_last, jnp.float32), jnp.zeros(keys_last, jnp.float32)
    for queries, keys in _tiles(q.shape[1], k.shape[1], mask, block):
        dq, dk_part, dv_part = tile.tile_gradients(
            tile.to_tile(q[:, queries], kv_heads),
            k_tile[:, :, keys],
            v_tile[:, :, keys],
            tile.statistics_to_tile(lse[:, queries], kv_heads),
            tile.statistics_to_tile(delta[:, queries], kv_heads),
            tile.to_tile(d_out[:, queries], kv_heads),
            _visible(mask, indices, queries, keys),
            mask,
        )
        dqs.append(tile.from_tile(dq.astype(q.dtype), queries.stop - queries.start))
        dk, dv = dk.at[..., keys].add(dk_part), dv.at[..., keys].add(dv_part)
    dk, dv = tile.keys_from_tile(dk), tile.keys_from_tile(dv)
    return jnp.concatenate(dqs, axis=1), dk.astype(k.dtype), dv.astype(v.dtype)


def _tiles(queries: int, keys: int, mask: Mask, block: int) -> list[tuple[slice, slice]]:
    """(queries, keys it may see) of each block of queries; at least one key, so that no tile is empty."""
    tiles = []
    for start in range(0, queries, block):
        stop = min(start + block, queries)
        first, last = 0, keys
        if mask.causal or mask.window is not None:
            last = min(stop, keys)
        if mask.window is not None:
            first = min(max(0, start - mask.window + 1), last - 1)
        tiles.append((slice(start, stop), slice(first, last)))
    return tiles


def _visible(mask: Mask, indices: TokenIndices, queries: slice, keys: slice):
    """The tile's mask; no index is compared where every key is in the past of every query."""
    segments = (None, None)
    if indices.query_segments is not None:
        segments = indices.query_segments[:, queries], indices.key_segments[:, keys]
    query_index, key_index = jnp.arange(queries.start, queries.stop), jnp.arange(keys.start, keys.stop)
    return tile.visibility(mask, query_index, key_index, *segments)
