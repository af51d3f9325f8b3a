"""Ring attention: keys and values travel around the `seq` axis, and no device ever holds more than two parts of a row.

At each of R steps a device attends from its queries to the part it holds and passes that part on. Partial results merge
by their log-sum-exp, in float32:

    lse = logaddexp(lse_a, lse_b)        out = out_a * exp(lse_a - lse) + out_b * exp(lse_b - lse)

The backward pass sends the parts around again together with the gradients that collect on them, which are home after R
steps. A part that this device's queries cannot see, by its indices or its documents, costs no arithmetic. All
communication is collective-permute between neighbours. Sources: arXiv:2310.01889; arXiv:2311.09431 for the balance.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ...models.attention.interface import Implementation, Mask, TokenIndices


class Part(NamedTuple):
    """The keys of one device's part of a row: what travels."""

    k: jax.Array  # [batch, keys, kv_heads, head_dim]
    v: jax.Array
    index: jax.Array  # [keys]
    segments: jax.Array | None  # [batch, keys]


@functools.cache
def wrap(implementation: Implementation, *, mesh_axis: str = "seq") -> Implementation:
    """`implementation` on one device's part of a row, [batch, sequence / ranks, heads, head_dim].

    For use where `mesh_axis` is manual. `indices` are those of this device's part; neither index may be None.
    """

    def forward(q, k, v, mask: Mask, indices: TokenIndices):
        def merged(out, lse, part: Part):
            def attended():
                part_out, part_lse = implementation.forward(q, part.k, part.v, mask, _against(part, indices))
                return _merge(out, lse, part_out.astype(jnp.float32), part_lse)

            return jax.lax.cond(_may_see(part, mask, indices), attended, lambda: (out, lse))

        def step(_, carry):
            out, lse, part = carry
            return *merged(out, lse, part), _pass_on(part, mesh_axis)

        out = _zeros_like(q)
        start = (out, out[..., 0] - jnp.inf, Part(k, v, indices.key_index, indices.key_segments))
        # The last part is not passed on.
        out, lse, part = jax.lax.fori_loop(0, jax.lax.axis_size(mesh_axis) - 1, step, start)
        out, lse = merged(out, lse, part)
        return out.astype(q.dtype), lse

    def backward(q, k, v, out, lse, d_out, mask: Mask, indices: TokenIndices):
        def added(dq, dk, dv, part: Part):
            def attended():
                more = implementation.backward(q, part.k, part.v, out, lse, d_out, mask, _against(part, indices))
                return tuple(sum_ + x.astype(jnp.float32) for sum_, x in zip((dq, dk, dv), more, strict=True))

            return jax.lax.cond(_may_see(part, mask, indices), attended, lambda: (dq, dk, dv))

        def step(_, carry):
            dq, dk, dv, part = carry
            dq, dk, dv = added(dq, dk, dv, part)
            return dq, *_pass_on((dk, dv, part), mesh_axis)

        start = (_zeros_like(q), _zeros_like(k), _zeros_like(v), Part(k, v, indices.key_index, indices.key_segments))
        dq, dk, dv, part = jax.lax.fori_loop(0, jax.lax.axis_size(mesh_axis) - 1, step, start)
        dq, dk, dv = added(dq, dk, dv, part)
        dk, dv = _pass_on((dk, dv), mesh_axis)  # the last hop home, which the keys need not make
        return tuple(x.astype(like.dtype) for x, like in zip((dq, dk, dv), (q, k, v), strict=True))

    return implementation._replace(forward=forward, backward=backward)


def _merge(out, lse, part_out, part_lse):
    """The softmax over both sets of keys."""
    together = jnp.logaddexp(lse, part_lse)
    finite = jnp.where(jnp.isneginf(together), 0.0, together)  # a query that has seen nothing yet: weights 0, not NaN
    weight, part_weight = (jnp.exp(x - finite)[..., None] for x in (lse, part_lse))
    return out * weight + part_out * part_weight, together


def _pass_on(tree, mesh_axis: str):
    """Give what we hold to the next device of the ring and take what the one before held."""
    ranks = jax.lax.axis_size(mesh_axis)
    return jax.lax.ppermute(tree, mesh_axis, [(rank, (rank + 1) % ranks) for rank in range(ranks)])


def _against(part: Part, indices: TokenIndices) -> TokenIndices:
    return TokenIndices(indices.query_index, part.index, indices.query_segments, part.segments)


def _may_see(part: Part, mask: Mask, indices: TokenIndices) -> jax.Array:
    """Whether any of our queries may see any of the part's keys, by the ranges of indices and documents."""
    query, key = indices.query_index, part.index
    possible = jnp.asarray(True)
    if mask.causal or mask.window is not None:
        possible &= query.max() >= key.min()
    if mask.window is not None:
        possible &= query.min() - key.max() < mask.window
    if part.segments is not None:
        ours, theirs = indices.query_segments, part.segments
        possible &= jnp.any((ours.max(1) >= theirs.min(1)) & (theirs.max(1) >= ours.min(1)))
    return possible


def _zeros_like(x: jax.Array) -> jax.Array:
    """float32 zeros that vary over the same manual axes as `x`."""
    return jnp.where(jnp.zeros(x.shape, bool), x, 0).astype(jnp.float32)
