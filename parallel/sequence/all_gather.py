"""All-gather: every device attends from its own queries to the keys and values of the whole row.

One all-gather of k and v, and in the backward pass one more and a reduce-scatter of their gradients. The keys of the
whole row are not saved: each device saves its own shard for the backward pass. Any mask and any implementation that
takes explicit indices works unchanged, and with few key-value heads the gathered arrays are small. Zigzag order gives
every device the same work. Source: Llama 3, arXiv:2407.21783, section 3.3.2.
"""

import functools

import jax
import jax.numpy as jnp

from ...models.attention.interface import Implementation, Mask, TokenIndices


@functools.cache
def wrap(implementation: Implementation, *, mesh_axis: str = "seq") -> Implementation:
    """`implementation` on one device's shard of a row, [batch, sequence / ranks, heads, head_dim].

    For use where `mesh_axis` is manual. `indices` are those of this device's shard; neither index may be None.
    """

    def forward(q, k, v, mask: Mask, indices: TokenIndices):
        return implementation.forward(q, *_gather((k, v), mesh_axis), mask, _with_all_keys(indices, mesh_axis))

    def backward(q, k, v, out, lse, d_out, mask: Mask, indices: TokenIndices):
        k, v = _gather((k, v), mesh_axis)
        dq, dk, dv = implementation.backward(q, k, v, out, lse, d_out, mask, _with_all_keys(indices, mesh_axis))
        return dq, _reduce_scatter(dk, mesh_axis), _reduce_scatter(dv, mesh_axis)

    return implementation._replace(forward=forward, backward=backward)


def _with_all_keys(indices: TokenIndices, mesh_axis: str) -> TokenIndices:
    """This device's queries against the row's keys."""
    return TokenIndices(
        indices.query_index,
        jax.lax.all_gather(indices.key_index, mesh_axis, tiled=True),
        indices.query_segments,
        None if indices.key_segments is None else _gather(indices.key_segments, mesh_axis),
    )


def _reduce_scatter(x, mesh_axis: str):
    """This device's shard of the sum over devices of a row's gradient; added in float32."""
    total = jax.lax.psum_scatter(x.astype(jnp.float32), mesh_axis, scatter_dimension=1, tiled=True)
    return total.astype(x.dtype)


def _gather(x, mesh_axis: str):
    """The whole row of [batch, sequence / ranks, ...] arrays."""
    return jax.lax.all_gather(x, mesh_axis, axis=1, tiled=True)
