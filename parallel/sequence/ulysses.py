"""Ulysses: an all-to-all turns parts of rows with all heads into whole rows with some heads, and back after attention.

Every kernel works unchanged, on whole rows; the degree is bounded by the number of key-value heads. Per device and pass
each of q, k, v, out crosses once, divided by the number of devices. Source: DeepSpeed-Ulysses, arXiv:2309.14509.
"""

import functools
from collections.abc import Callable

import jax

from ...configs.errors import UserError
from ...models.attention.interface import Implementation, Mask, Where, attend


@functools.cache
def wrap(implementation: Implementation, *, mesh_axis: str = "seq") -> Callable[..., jax.Array]:
    """`attend(q, k, v, mask, where)` on one device's part of a row, [batch, sequence / ranks, heads, head_dim].

    For use where `mesh_axis` is manual. `where` holds this device's part; its indices may be None if the row as a whole
    is in plain order. Raises UserError where the devices cannot share this device's key-value heads evenly.
    """

    def attend_whole_rows(q, k, v, mask: Mask, where: Where):
        ranks, kv_heads = jax.lax.axis_size(mesh_axis), k.shape[2]
        if kv_heads % ranks:
            raise UserError(
                f"sequence.parallel: ulysses shares heads among mesh.seq = {ranks} devices, which does not divide the "
                f"{kv_heads} key-value heads of one tensor shard; use all-gather or ring, or a smaller mesh.seq"
            )
        q, k, v = (_swap(x, mesh_axis, split=2, join=1) for x in (q, k, v))
        out = attend(implementation, q, k, v, mask, jax.tree.map(lambda x: _gather(x, mesh_axis), where))
        return _swap(out, mesh_axis, split=1, join=2)

    return attend_whole_rows


def _swap(x, mesh_axis: str, *, split: int, join: int):
    return jax.lax.all_to_all(x, mesh_axis, split_axis=split, concat_axis=join, tiled=True)


def _gather(x, mesh_axis: str):
    """Whole rows of indices [sequence / ranks] or segments [batch, sequence / ranks]."""
    return jax.lax.all_gather(x, mesh_axis, axis=x.ndim - 1, tiled=True)
