"""Attention on the mesh: kernels see one device's rows and heads, and where `seq` is above 1 all of the sequence.

`models/attention/` computes on arrays that are whole on a device; this wraps any of its implementations in a
`shard_map`: rows over data x fsdp, heads over tensor, and the sequence by the strategy of `parallel/sequence/`.
"""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from ..models.attention.interface import Mask, Where, attend
from ..models.attention.registry import choose
from .sequence.attend import repeated_heads, sequence_parallel
from .sequence.order import ORDER_OF

ROWS = ("data", "fsdp")


def sharded_attention(name: str, *, mesh: Mesh, strategy: str) -> Callable[..., jax.Array]:
    """`attend(q, k, v, mask, where)` over global arrays [batch, sequence, heads, head_dim] for `model.attention: name`.

    `strategy` is `sequence.parallel`, for a mesh whose `seq` is above 1. The result equals the implementation's on one
    device. Raises UserError where the implementation or the strategy refuses the combination.
    """
    platform = mesh.devices.flat[0].platform

    def sharded(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, where: Where) -> jax.Array:
        implementation = choose(name, mask=mask, where=where, q=q, k=k, platform=platform)
        if mesh.size == 1:
            return attend(implementation, q, k, v, mask, where)
        if mesh.shape["seq"] > 1:
            return sequence_parallel(implementation, strategy=strategy, mesh=mesh)(q, k, v, mask, where)
        return over_rows_and_heads(partial(attend, implementation), mesh, q, k, v, mask, where)

    return sharded


def token_order(tokens: int, *, mesh: Mesh, strategy: str) -> np.ndarray | None:
    """Which token stands at each place of a row on `mesh`, int32 [tokens]; None: in order."""
    ranks = mesh.shape["seq"]
    order = ORDER_OF[strategy](tokens, ranks=ranks) if ranks > 1 else None
    return None if order is None or (order == np.arange(tokens)).all() else order


def over_rows_and_heads(
    local: Callable[..., jax.Array], mesh: Mesh, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, where: Where
) -> jax.Array:
    """`local` on each device's rows and heads; nothing is communicated."""
    tensor = mesh.shape["tensor"]
    k, v = (repeated_heads(x, tensor) for x in (k, v))
    rows = ROWS if q.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None
    heads = PartitionSpec(rows, None, "tensor", None)
    where_specs = Where(
        query_index=None if where.query_index is None else PartitionSpec(),
        key_index=None if where.key_index is None else PartitionSpec(),
        query_segments=None if where.query_segments is None else PartitionSpec(rows, None),
        key_segments=None if where.key_segments is None else PartitionSpec(rows, None),
    )
    # No mesh is named: inside another shard_map (a pipeline) the axes left to the partitioner are the ones meant here.
    mapped = jax.shard_map(
        lambda q, k, v, where: local(q, k, v, mask, where),
        in_specs=(heads, heads, heads, where_specs),
        out_specs=heads,
        axis_names={*ROWS, "tensor"},
        check_vma=False,
    )
    return mapped(q, k, v, where)
