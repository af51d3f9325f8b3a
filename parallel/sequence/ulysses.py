"""Ulysses: an all-to-all turns parts of rows with all heads into whole rows with some heads, and back after attention.

Every kernel works unchanged, on whole rows; the degree is bounded by the number of key-value heads. The forward pass
swaps q, k, v and out; the backward pass swaps them once more, instead of keeping a second copy, and the gradients with
them. Source: DeepSpeed-Ulysses, arXiv:2309.14509.
"""

import functools

import jax

from ...configs.errors import UserError
from ...models.attention.interface import Implementation, Mask, TokenIndices


@functools.cache
def wrap(implementation: Implementation, *, mesh_axis: str = "seq") -> Implementation:
    """`implementation` on one device's part of a row, [batch, sequence / ranks, heads, head_dim].

    For use where `mesh_axis` is manual. `indices` are those of this device's part; both indexes may be None if the
    whole row is in plain order. Raises UserError where the devices cannot share this device's key-value heads evenly.
    """

    def forward(q, k, v, mask: Mask, indices: TokenIndices):
        _check_heads(k, mesh_axis)
        rows = (_to_rows(x, mesh_axis) for x in (q, k, v))
        return tuple(_to_heads(x, mesh_axis) for x in implementation.forward(*rows, mask, _whole(indices, mesh_axis)))

    def backward(q, k, v, out, lse, d_out, mask: Mask, indices: TokenIndices):
        rows = (_to_rows(x, mesh_axis) for x in (q, k, v, out, lse, d_out))
        return tuple(_to_heads(x, mesh_axis) for x in implementation.backward(*rows, mask, _whole(indices, mesh_axis)))

    return implementation._replace(forward=forward, backward=backward)


def _to_rows(x, mesh_axis: str):
    """[batch, sequence / ranks, heads, ...] -> [batch, sequence, heads / ranks, ...]."""
    return jax.lax.all_to_all(x, mesh_axis, split_axis=2, concat_axis=1, tiled=True)


def _to_heads(x, mesh_axis: str):
    """[batch, sequence, heads / ranks, ...] -> [batch, sequence / ranks, heads, ...]."""
    return jax.lax.all_to_all(x, mesh_axis, split_axis=1, concat_axis=2, tiled=True)


def _whole(indices: TokenIndices, mesh_axis: str) -> TokenIndices:
    """Whole rows of indices [sequence / ranks] and segments [batch, sequence / ranks]."""
    return jax.tree.map(lambda x: jax.lax.all_gather(x, mesh_axis, axis=x.ndim - 1, tiled=True), indices)


def _check_heads(k, mesh_axis: str) -> None:
    ranks, kv_heads = jax.lax.axis_size(mesh_axis), k.shape[2]
    if kv_heads % ranks:
        raise UserError(
            f"sequence.parallel: ulysses shares heads among mesh.seq = {ranks} devices, which does not divide the "
            f"{kv_heads} key-value heads of one tensor shard; use all-gather or ring, or a smaller mesh.seq"
        )
