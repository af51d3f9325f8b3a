"""Ulysses: an all-to-all turns shards of rows with all heads into whole rows with some heads, and back after attention.

Every kernel works unchanged, on whole rows; at most as many devices as key-value heads can be used. The forward pass
exchanges q, k, v and out; the backward pass exchanges them again, instead of saving a second copy, and their gradients.
Source: DeepSpeed-Ulysses, arXiv:2309.14509.
"""

import functools

import jax

from ...configs.errors import UserError
from ...models.attention.interface import Implementation, Mask, TokenIndices


@functools.cache
def wrap(implementation: Implementation, *, mesh_axis: str = "seq") -> Implementation:
    """`implementation` on one device's shard of a row, [batch, sequence / ranks, heads, head_dim].

    For use where `mesh_axis` is manual. `indices` are those of this device's shard; both indexes may be None if the
    whole row is in plain order. Raises UserError where the devices cannot share this device's key-value heads evenly.
    """

    def to_rows(x):  # [batch, sequence / ranks, heads, ...] -> [batch, sequence, heads / ranks, ...]
        return jax.lax.all_to_all(x, mesh_axis, split_axis=2, concat_axis=1, tiled=True)

    def to_shards(x):  # [batch, sequence, heads / ranks, ...] -> [batch, sequence / ranks, heads, ...]
        return jax.lax.all_to_all(x, mesh_axis, split_axis=1, concat_axis=2, tiled=True)

    def gather(indices: TokenIndices) -> TokenIndices:  # [sequence / ranks] and [batch, sequence / ranks] -> whole rows
        return jax.tree.map(lambda x: jax.lax.all_gather(x, mesh_axis, axis=x.ndim - 1, tiled=True), indices)

    def forward(q, k, v, mask: Mask, indices: TokenIndices):
        _check_heads(k, mesh_axis)
        return tuple(map(to_shards, implementation.forward(*map(to_rows, (q, k, v)), mask, gather(indices))))

    def backward(q, k, v, out, lse, d_out, mask: Mask, indices: TokenIndices):
        rows = map(to_rows, (q, k, v, out, lse, d_out))
        return tuple(map(to_shards, implementation.backward(*rows, mask, gather(indices))))

    return implementation._replace(forward=forward, backward=backward)


def _check_heads(k, mesh_axis: str) -> None:
    ranks, kv_heads = jax.lax.axis_size(mesh_axis), k.shape[2]
    if kv_heads % ranks:
        raise UserError(
            f"sequence.parallel: ulysses splits heads over mesh.seq = {ranks} devices, which does not divide the "
            f"{kv_heads} key-value heads of one tensor shard; use all-gather or ring, or a smaller mesh.seq"
        )
