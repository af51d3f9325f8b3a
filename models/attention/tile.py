"""The arithmetic of one tile of scores (some queries against some keys) that all our implementations share.

Tiles are head-major, [batch, kv_heads, rows, head_dim]: the `group` query heads that read one key head are stacked
along `rows`, group first, so that grouped and multi-query attention are the same matrix products as plain attention.
Statistics are float32; matrix products read the inputs' dtype and accumulate in float32.
"""

import jax
import jax.numpy as jnp

from .interface import ALL_SEGMENTS, Mask

# Index of a key that only pads a block: past every query, hence invisible wherever there is an order.
PADDING = jnp.iinfo(jnp.int32).max


def to_tile(x: jax.Array, kv_heads: int) -> jax.Array:
    """[batch, tokens, heads, head_dim] -> [batch, kv_heads, group * tokens, head_dim]."""
    batch, tokens, heads, head_dim = x.shape
    grouped = x.reshape(batch, tokens, kv_heads, heads // kv_heads, head_dim)
    return grouped.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, head_dim)


def from_tile(x: jax.Array, tokens: int) -> jax.Array:
    """[batch, kv_heads, group * tokens, head_dim] -> [batch, tokens, heads, head_dim]."""
    batch, kv_heads, rows, head_dim = x.shape
    grouped = x.reshape(batch, kv_heads, rows // tokens, tokens, head_dim)
    return grouped.transpose(0, 3, 1, 2, 4).reshape(batch, tokens, -1, head_dim)


def keys_from_tile(x: jax.Array) -> jax.Array:
    """[batch, kv_heads, head_dim, keys], as `tile_gradients` gives dk and dv -> [batch, keys, kv_heads, head_dim]."""
    return x.transpose(0, 3, 1, 2)


def statistics_to_tile(x: jax.Array, kv_heads: int) -> jax.Array:
    """[batch, tokens, heads] -> [batch, kv_heads, group * tokens]."""
    return to_tile(x[..., None], kv_heads)[..., 0]


def statistics_from_tile(x: jax.Array, tokens: int) -> jax.Array:
    """[batch, kv_heads, group * tokens] -> [batch, tokens, heads]."""
    return from_tile(x[..., None], tokens)[..., 0]


def visibility(mask: Mask, query_index, key_index, query_segments, key_segments, *, padded: bool = False):
    """Which keys each query sees, [batch or 1, queries, keys] bool; None: all. `padded`: some keys are PADDING."""
    visible = None
    age = query_index[:, None] - key_index[None, :]  # tokens from the key to the query
    if mask.causal or mask.window is not None:
        visible = age >= 0
    if mask.window is not None:
        visible = visible & (age < mask.window)
    if visible is None and padded:
        visible = jnp.broadcast_to(key_index[None, :] != PADDING, age.shape)
    visible = None if visible is None else visible[None]
    if query_segments is not None:
        keys = key_segments[:, None, :]
        same = (query_segments[:, :, None] == keys) | (keys == ALL_SEGMENTS)
        visible = same if visible is None else visible & same
    return visible


def scores(q: jax.Array, k: jax.Array, mask: Mask) -> jax.Array:
    """Scaled and capped scores of a tile before anything is hidden, float32 [batch, kv_heads, rows, keys]."""
    scale = q.shape[-1] ** -0.5 if mask.scale is None else mask.scale
    raw = scale * jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
    return raw if mask.softcap is None else mask.softcap * jnp.tanh(raw / mask.softcap)


def apply_visibility(scores: jax.Array, visible) -> jax.Array:
    """-inf where `visible` [batch or 1, queries, keys] is False, for each of the heads stacked along rows."""
    if visible is None:
        return scores
    batch, kv_heads, rows, keys = scores.shape
    grouped = scores.reshape(batch, kv_heads, rows // visible.shape[1], visible.shape[1], keys)
    return jnp.where(visible[:, None, None], grouped, -jnp.inf).reshape(scores.shape)


def finite(statistic: jax.Array) -> jax.Array:
    """`statistic` with 0 for -inf, so that exp(-inf - statistic) of a query that sees nothing is 0 and not NaN."""
    return jnp.where(jnp.isneginf(statistic), 0.0, statistic)


def log_sum_exp(maximum: jax.Array, total: jax.Array) -> jax.Array:
    """maximum + log(total), -inf where nothing was summed."""
    return jnp.where(total > 0, finite(maximum) + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)


def tile_gradients(q, k, v, lse, delta, d_out, visible, mask: Mask):
    """The float32 terms of one tile in dq [batch, kv_heads, rows, head_dim], dk, dv [batch, kv_heads, head_dim, keys].

    `lse` and `delta` = rowsum(d_out * out), [batch, kv_heads, rows], are over all keys, also those of other tiles.
    """
    scale = q.shape[-1] ** -0.5 if mask.scale is None else mask.scale
    capped = scores(q, k, mask)
    p = jnp.exp(apply_visibility(capped, visible) - finite(lse)[..., None])
    # Keys last in dk and dv: a CPU transposes the narrow operand of the product and not the scores, at half the time.
    dv = jnp.einsum("bhqd,bhqk->bhdk", d_out, p.astype(d_out.dtype), preferred_element_type=jnp.float32)
    dp = jnp.einsum("bhqd,bhkd->bhqk", d_out, v, preferred_element_type=jnp.float32)
    d_scores = p * (dp - delta[..., None])
    if mask.softcap is not None:
        d_scores *= 1.0 - jnp.square(capped / mask.softcap)  # derivative of the cap: 1 - tanh^2
    d_scores = (scale * d_scores).astype(q.dtype)
    dq = jnp.einsum("bhqk,bhkd->bhqd", d_scores, k, preferred_element_type=jnp.float32)
    dk = jnp.einsum("bhqd,bhqk->bhdk", q, d_scores, preferred_element_type=jnp.float32)
    return dq, dk, dv
