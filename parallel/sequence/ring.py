"""Ring attention: keys and values travel around the `seq` axis, and a device never holds more than two shards of a row.

At each of R steps a device attends from its queries to the keys that it holds and sends these keys on. Partial results
merge by their log-sum-exp, in float32:

    lse = logaddexp(lse_a, lse_b)        out = out_a * exp(lse_a - lse) + out_b * exp(lse_b - lse)

The backward pass sends the keys around again together with the gradients that collect on them, which are back after R
steps. Keys that this device's queries cannot attend to, by indices or documents, cost no arithmetic. All communication
is collective-permute between neighbours. Sources: arXiv:2310.01889; arXiv:2311.09431 for the balance.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ...models.attention.interface import Implementation, Mask, TokenIndices


class KeyShard(NamedTuple):
    """Keys and values of one device's shard of a row: what travels."""

    k: jax.Array  # [batch, keys, kv_heads, head_dim]
    v: jax.Array
    index: jax.Array  # [keys]
    segments: jax.Array | None  # [batch, keys]


@functools.cache
def wrap(implementation: Implementation, *, mesh_axis: str = "seq") -> Implementation:
    """`implementation` on one device's shard of a row, [batch, sequence / ranks, heads, head_dim].

    For use where `mesh_axis` is manual. `indices` are those of this device's shard; neither index may be None.
    """

    def forward(q, k, v, mask: Mask, indices: TokenIndices):
        def attend_shard(out, lse, shard: KeyShard):
            def attend():
                shard_out, shard_lse = implementation.forward(q, shard.k, shard.v, mask, _with_keys(indices, shard))
                return _merge(out, lse, shard_out.astype(jnp.float32), shard_lse)

            return jax.lax.cond(may_attend(shard, mask, indices), attend, lambda: (out, lse))

        def step(_, carry):
            out, lse, shard = carry
            return *attend_shard(out, lse, shard), _send_to_next(shard, mesh_axis)

        out = _zeros_like(q)
        start = (out, out[..., 0] - jnp.inf, KeyShard(k, v, indices.key_index, indices.key_segments))
        # The last shard is not sent on.
        out, lse, shard = jax.lax.fori_loop(0, jax.lax.axis_size(mesh_axis) - 1, step, start)
        out, lse = attend_shard(out, lse, shard)
        return out.astype(q.dtype), lse

    def backward(q, k, v, out, lse, d_out, mask: Mask, indices: TokenIndices):
        def add_gradients(dq, dk, dv, shard: KeyShard):
            def add():
                indices_of_shard = _with_keys(indices, shard)
                gradients = implementation.backward(q, shard.k, shard.v, out, lse, d_out, mask, indices_of_shard)
                return tuple(total + x.astype(jnp.float32) for total, x in zip((dq, dk, dv), gradients, strict=True))

            return jax.lax.cond(may_attend(shard, mask, indices), add, lambda: (dq, dk, dv))

        def step(_, carry):
            dq, dk, dv, shard = carry
            dq, dk, dv = add_gradients(dq, dk, dv, shard)
            return dq, *_send_to_next((dk, dv, shard), mesh_axis)

        start = (
            _zeros_like(q),
            _zeros_like(k),
            _zeros_like(v),
            KeyShard(k, v, indices.key_index, indices.key_segments),
        )
        dq, dk, dv, shard = jax.lax.fori_loop(0, jax.lax.axis_size(mesh_axis) - 1, step, start)
        dq, dk, dv = add_gradients(dq, dk, dv, shard)
        dk, dv = _send_to_next((dk, dv), mesh_axis)  # the last hop back, which the keys need not make
        return tuple(x.astype(like.dtype) for x, like in zip((dq, dk, dv), (q, k, v), strict=True))

    return implementation._replace(forward=forward, backward=backward)


def _merge(out, lse, shard_out, shard_lse):
    """The softmax over both sets of keys."""
    total = jnp.logaddexp(lse, shard_lse)
    finite = jnp.where(jnp.isneginf(total), 0.0, total)  # a query that has attended to no key yet: weights 0, not NaN
    weight, shard_weight = (jnp.exp(x - finite)[..., None] for x in (lse, shard_lse))
    return out * weight + shard_out * shard_weight, total


def _send_to_next(tree, mesh_axis: str):
    """Send `tree` to the next device of the ring, and return what the previous device sent."""
    ranks = jax.lax.axis_size(mesh_axis)
    return jax.lax.ppermute(tree, mesh_axis, [(rank, (rank + 1) % ranks) for rank in range(ranks)])


def _with_keys(indices: TokenIndices, shard: KeyShard) -> TokenIndices:
    return TokenIndices(indices.query_index, shard.index, indices.query_segments, shard.segments)


def may_attend(shard: KeyShard, mask: Mask, indices: TokenIndices) -> jax.Array:
    """Whether any query of `indices` may attend to any key of `shard`, by the ranges of indices and documents."""
    query, key = indices.query_index, shard.index
    possible = jnp.asarray(True)
    if mask.causal or mask.window is not None:
        possible &= query.max() >= key.min()
    if mask.window is not None:
        possible &= query.min() - key.max() < mask.window
    if shard.segments is not None:
        queries, keys = indices.query_segments, shard.segments
        possible &= jnp.any((queries.max(1) >= keys.min(1)) & (keys.max(1) >= queries.min(1)))
    return possible


def _zeros_like(x: jax.Array) -> jax.Array:
    """float32 zeros that vary over the same manual axes as `x`."""
    return jnp.where(jnp.zeros(x.shape, bool), x, 0).astype(jnp.float32)
