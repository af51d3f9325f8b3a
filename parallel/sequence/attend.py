"""Attention over global arrays whose rows are cut over the `seq` axis: one `shard_map` around one of three strategies.

The map is manual in every axis that shards an activation, rows over data x fsdp and heads over tensor, so that nothing
is left for the partitioner to gather, and a kernel's control flow is one device's own business.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from ...configs.errors import UserError
from ...models.attention.interface import Implementation, Mask, Where
from . import gathered, ring, ulysses

STRATEGIES = {"all-gather": gathered.wrap, "ring": ring.wrap, "ulysses": ulysses.wrap}
ROWS = ("data", "fsdp")


def sequence_parallel(implementation: Implementation, *, strategy: str, mesh: Mesh) -> Callable[..., jax.Array]:
    """`attend(q, k, v, mask, where)` over global [batch, sequence, heads, head_dim] arrays, sharded over `mesh`.

    Tokens stand in run order (`parallel/sequence/order.py`) and `where.query_index = where.key_index` is that order;
    None is plain order. The result equals the implementation's on one device. Raises UserError on an unknown strategy,
    a sequence that `mesh.seq` does not divide, and where the strategy or the implementation refuses.
    """
    if strategy not in STRATEGIES:
        raise UserError.no_match("sequence.parallel", [strategy], known=STRATEGIES)
    local = STRATEGIES[strategy](implementation, mesh_axis="seq")

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, where: Where) -> jax.Array:
        _check_cut(q, k, mesh)
        if where.query_index is None and strategy != "ulysses":  # a part of a row does not start at 0
            order = jnp.arange(q.shape[1], dtype=jnp.int32)
            where = dataclasses.replace(where, query_index=order, key_index=order)
        k, v = (repeated_heads(x, mesh.shape["tensor"]) for x in (k, v))
        rows = ROWS if q.shape[0] % math.prod(mesh.shape[axis] for axis in ROWS) == 0 else None
        parts = PartitionSpec(rows, "seq", "tensor", None)
        where_parts = jax.tree.map(lambda x: PartitionSpec("seq") if x.ndim == 1 else PartitionSpec(rows, "seq"), where)
        mapped = jax.shard_map(
            lambda q, k, v, where: local(q, k, v, mask, where),
            # Inside another shard_map (a pipeline) the mesh is the one already in use, some of its axes manual.
            mesh=mesh if jax.sharding.get_abstract_mesh().empty else None,
            in_specs=(parts, parts, parts, where_parts),
            out_specs=parts,
            axis_names={*(rows or ()), "seq", "tensor"},
        )
        return mapped(q, k, v, where)

    return attend


def repeated_heads(x: jax.Array, devices: int) -> jax.Array:
    """Keys or values [batch, keys, kv_heads, head_dim], each head repeated until `devices` can share them evenly."""
    kv_heads = x.shape[2]
    return x if kv_heads % devices == 0 else jnp.repeat(x, math.lcm(kv_heads, devices) // kv_heads, axis=2)


def _check_cut(q, k, mesh: Mesh) -> None:
    ranks, tensor = mesh.shape["seq"], mesh.shape["tensor"]
    if q.shape[1] % ranks or k.shape[1] % ranks:
        raise UserError(
            f"mesh.seq: {ranks} devices cannot share {q.shape[1]} queries and {k.shape[1]} keys evenly; "
            "use a data.sequence_length that it divides"
        )
    if q.shape[2] % tensor:
        raise UserError(f"mesh.tensor: {tensor} devices cannot share {q.shape[2]} heads evenly; use a divisor of heads")
