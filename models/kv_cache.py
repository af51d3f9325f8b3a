"""Keys and values of earlier tokens, so that generating reads each token once. Training has no cache.

    cache = {segment: [{"k", "v"} for each place of its pattern]}      [repeats, batch, capacity, kv_heads, head_dim]

Slot i holds the token of index i of every row. A block sees its own layer's part and answers with the *entries* of the
tokens it was just given; they are written for all layers at once, after the last one, so that a loop updates the cache
in place and never copies it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ..configs.sections.model import ModelConfig
from .attention.interface import ALL_SEGMENTS, TokenIndices
from .context import Context

LAYER_AXES = ("batch", None, "kv_heads", None)  # one layer's keys or values

Cache = dict[str, list[dict[str, jax.Array]]]


def empty_cache(model: ModelConfig, *, rows: int, capacity: int, ctx: Context) -> Cache:
    """A cache of zeros for `rows` sequences of up to `capacity` tokens, of `ctx`'s dtype and placed by it."""
    shape = (rows, capacity, model.key_value_heads, model.head_width)

    def layers(repeats: int) -> jax.Array:
        return ctx.constrain(jnp.zeros((repeats, *shape), ctx.compute_dtype), (None, *LAYER_AXES))

    return {
        str(number): [{"k": layers(repeats), "v": layers(repeats)} for _ in pattern]
        for number, (pattern, repeats) in enumerate(model.segments)
    }


def capacity(cache: Cache) -> int:
    """Tokens a row can hold."""
    return jax.tree.leaves(cache)[0].shape[2]


def write_entries(cache: Cache, entries: Cache, *, index: jax.Array) -> Cache:
    """The cache with `entries`, as `Decoder.hidden` returned them, in the slots from `index` (a scalar) on."""
    return jax.tree.map(
        lambda whole, new: jax.lax.dynamic_update_slice_in_dim(whole, new.astype(whole.dtype), index, axis=2),
        cache,
        entries,
    )


def attended_keys_values(
    k: jax.Array, v: jax.Array, ctx: Context, *, prefix: dict[str, jax.Array] | None = None
) -> tuple[jax.Array, jax.Array, TokenIndices, dict[str, jax.Array] | None]:
    """Keys and values [batch, keys, kv_heads, head_dim] that new tokens attend to, where they stand, and their entries.

    Without a cache these are the new tokens' own. With one they are all its slots: those not yet written lie after
    every query, so the causal mask hides them. Every document sees a `prefix` in front of its own.
    """
    if ctx.cache is None:
        indices, entries = TokenIndices(ctx.index, ctx.index, ctx.segment_ids, ctx.segment_ids), None
    else:
        k, v, indices, entries = update_slots(k, v, ctx)
    return (k, v, indices, entries) if prefix is None else (*prepend_prefix(prefix, k, v, indices, ctx), entries)


def prepend_prefix(
    prefix: dict[str, jax.Array], k: jax.Array, v: jax.Array, indices: TokenIndices, ctx: Context
) -> tuple[jax.Array, jax.Array, TokenIndices]:
    """Keys and values after those of `prefix`, {"k", "v"} [length, kv_heads, head_dim], which all documents share.

    A token's keys depend on what stands before it, so those of a prefix are the same in front of every document.
    """
    rows, own = k.shape[:2]
    length = prefix["k"].shape[0]

    def joined(name: str, x: jax.Array) -> jax.Array:
        same = jnp.broadcast_to(prefix[name].astype(x.dtype), (rows, *prefix[name].shape))
        # Cut like the keys before they are joined: else the partitioner may move them by permutes, inside a block.
        return ctx.constrain(jnp.concatenate([ctx.constrain(same, LAYER_AXES), x], axis=1), LAYER_AXES)

    index = jnp.arange(own, dtype=jnp.int32) if indices.key_index is None else indices.key_index
    segments = indices.key_segments
    if segments is not None:
        segments = jnp.concatenate([jnp.full((rows, length), ALL_SEGMENTS, segments.dtype), segments], axis=1)
    indices = TokenIndices(
        query_index=index if indices.query_index is None else indices.query_index,
        key_index=jnp.concatenate([jnp.arange(-length, 0, dtype=jnp.int32), index]),
        query_segments=indices.query_segments,
        key_segments=segments,
    )
    return joined("k", k), joined("v", v), indices


def update_slots(
    k: jax.Array, v: jax.Array, ctx: Context
) -> tuple[jax.Array, jax.Array, TokenIndices, dict[str, jax.Array]]:
    """`with_earlier` of a cache."""
    entries = {"k": k, "v": v}
    whole: Any = {
        name: ctx.constrain(
            jax.lax.dynamic_update_slice_in_dim(ctx.cache[name], new.astype(ctx.compute_dtype), ctx.index[0], axis=1),
            LAYER_AXES,
        )
        for name, new in entries.items()
    }
    slots = jnp.arange(whole["k"].shape[1], dtype=jnp.int32)
    return whole["k"], whole["v"], TokenIndices(ctx.index, slots, ctx.segment_ids, ctx.cache_segment_ids), entries
