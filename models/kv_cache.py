"""The key-value cache: keys and values of earlier tokens, so that generation reads each token once.

    cache = {segment: [{"k", "v"} for each position of its pattern]}      [repeats, batch, capacity, kv_heads, head_dim]

Slot i holds the token with index i of every row. A block reads its own layer's part and returns the *entries* of its
new tokens. The entries of all layers are written at once, after the last layer, so that a loop updates the cache in
place and never copies it. Training has no cache.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ..configs.sections.model import ModelConfig
from .attention.interface import ALL_SEGMENTS, TokenIndices
from .context import Context

LAYER_AXES = ("batch", None, "kv_heads", None)  # of one layer's keys or values

Cache = dict[str, list[dict[str, jax.Array]]]


def empty_cache(model: ModelConfig, *, rows: int, capacity: int, ctx: Context) -> Cache:
    """A cache of zeros for `rows` sequences of up to `capacity` tokens, with the dtype and sharding of `ctx`."""
    shape = (rows, capacity, model.key_value_heads, model.head_width)

    def layers(repeats: int) -> jax.Array:
        return ctx.constrain(jnp.zeros((repeats, *shape), ctx.compute_dtype), (None, *LAYER_AXES))

    return {
        str(number): [{"k": layers(repeats), "v": layers(repeats)} for _ in pattern]
        for number, (pattern, repeats) in enumerate(model.segments)
    }


def capacity(cache: Cache) -> int:
    """How many tokens a row can hold."""
    return jax.tree.leaves(cache)[0].shape[2]


def write_entries(cache: Cache, entries: Cache, *, index: jax.Array) -> Cache:
    """The cache with `entries` of `Decoder.hidden` in the slots from `index` (a scalar) on."""
    return jax.tree.map(
        lambda slots, new: jax.lax.dynamic_update_slice_in_dim(slots, new.astype(slots.dtype), index, axis=2),
        cache,
        entries,
    )


def attended_keys_values(
    k: jax.Array, v: jax.Array, ctx: Context, *, prefix: dict[str, jax.Array] | None = None
) -> tuple[jax.Array, jax.Array, TokenIndices, dict[str, jax.Array] | None]:
    """(keys, values, indices, entries): the keys and values [batch, keys, kv_heads, head_dim] that new tokens attend
    to.

    Without a cache these are the new tokens' own, and entries are None. With a cache they are all its slots: slots not
    yet written come after every query, so the causal mask hides them. A `prefix` is prepended to every document.
    """
    if ctx.cache is None:
        indices, entries = TokenIndices(ctx.index, ctx.index, ctx.segment_ids, ctx.segment_ids), None
    else:
        k, v, indices, entries = update_slots(k, v, ctx)
    return (k, v, indices, entries) if prefix is None else (*prepend_prefix(prefix, k, v, indices, ctx), entries)


def prepend_prefix(
    prefix: dict[str, jax.Array], k: jax.Array, v: jax.Array, indices: TokenIndices, ctx: Context
) -> tuple[jax.Array, jax.Array, TokenIndices]:
    """Prepend `prefix`, {"k", "v"} [length, kv_heads, head_dim], to the keys and values of all documents.

    The keys of a token depend only on earlier tokens, so those of a prefix are the same for every document.
    """
    rows, keys = k.shape[:2]
    length = prefix["k"].shape[0]

    def concatenate(name: str, x: jax.Array) -> jax.Array:
        repeated = jnp.broadcast_to(prefix[name].astype(x.dtype), (rows, *prefix[name].shape))
        # Sharded like the keys first: else the partitioner may insert collective permutes inside a pipeline's branch.
        return ctx.constrain(jnp.concatenate([ctx.constrain(repeated, LAYER_AXES), x], axis=1), LAYER_AXES)

    index = jnp.arange(keys, dtype=jnp.int32) if indices.key_index is None else indices.key_index
    segments = indices.key_segments
    if segments is not None:
        segments = jnp.concatenate([jnp.full((rows, length), ALL_SEGMENTS, segments.dtype), segments], axis=1)
    indices = TokenIndices(
        query_index=index if indices.query_index is None else indices.query_index,
        key_index=jnp.concatenate([jnp.arange(-length, 0, dtype=jnp.int32), index]),
        query_segments=indices.query_segments,
        key_segments=segments,
    )
    return concatenate("k", k), concatenate("v", v), indices


def update_slots(
    k: jax.Array, v: jax.Array, ctx: Context
) -> tuple[jax.Array, jax.Array, TokenIndices, dict[str, jax.Array]]:
    """`attended_keys_values` with a cache: (all keys, all values, indices, entries)."""
    entries = {"k": k, "v": v}
    cache: Any = {
        name: ctx.constrain(
            jax.lax.dynamic_update_slice_in_dim(ctx.cache[name], new.astype(ctx.compute_dtype), ctx.index[0], axis=1),
            LAYER_AXES,
        )
        for name, new in entries.items()
    }
    slots = jnp.arange(cache["k"].shape[1], dtype=jnp.int32)
    return cache["k"], cache["v"], TokenIndices(ctx.index, slots, ctx.segment_ids, ctx.cache_segment_ids), entries
