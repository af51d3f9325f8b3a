"""Attention on the mesh: kernels see one device's rows and heads, and where `seq` is above 1 all of the sequence.

`models/attention/` computes on arrays that are whole on a device; this wraps any of its implementations in a
`shard_map`: rows over data x fsdp, heads over tensor, and the sequence by the strategy of `parallel/sequence/`.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from ..models.attention.interface import Mask, Where, attend
from ..models.attention.registry import choose

ROWS = ("data", "fsdp")


def sharded_attention(name: str, *, mesh: Mesh, strategy: str) -> Callable[..., jax.Array]:
    """`attend(q, k, v, mask, where)` over global arrays [batch, sequence, heads, head_dim] for `model.attention: name`.

    `strategy` is `sequence.parallel`. The result equals the implementation's on one device. Raises UserError where the
    implementation refuses the combination.
    """
    platform = mesh.devices.flat[0].platform

    def local(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, where: Where) -> jax.Array:
        implementation = choose(name, mask=mask, where=where, q=q, k=k, platform=platform)
        return attend(implementation, q, k, v, mask, where)

    if mesh.size == 1:
        return local
    return partial(over_rows_and_heads, local, mesh)


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


def repeated_heads(x: jax.Array, devices: int) -> jax.Array:
    """Keys or values with each head repeated until `devices` can share them evenly."""
    kv_heads = x.shape[2]
    return x if kv_heads % devices == 0 else jnp.repeat(x, devices // kv_heads, axis=2)
