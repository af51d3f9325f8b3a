"""The executor's `shard_map`: over `pipe` and the batch axes, and over `replica` too under `jax.vmap`.

The map takes `replica` itself because the maps inside it (attention, routing) need that axis. A nested map must not
take an axis that stands before one of its parent's in the mesh: XLA of JAX 0.12 lists the axes of both in the order of
nesting, expects the order of the mesh, and aborts the process ("Manual axes must be sorted by mesh axis index").
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from .stage_functions import MANUAL_AXES

REPLICA_AXIS = "replica"


def map_over_devices(function: Callable[..., Any], *, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`function(*arguments)` on each device, with the shards that the specs name; they name axes of `MANUAL_AXES` only.

    Under `jax.vmap` each device has the arrays of its own replicas; what is not mapped is the same for all replicas.
    """

    def shard_map(function: Callable[..., Any], axes: set[str], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        return jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False
        )

    @jax.custom_batching.custom_vmap
    def call_mapped(*arguments: Any) -> Any:
        return shard_map(function, MANUAL_AXES, in_specs, out_specs)(*arguments)

    @call_mapped.def_vmap
    def over_replicas(count: int, has_replicas: Any, *arguments: Any) -> tuple[Any, Any]:
        del count
        has_replicas = tuple(has_replicas)  # of each array, whether its first dimension is the replicas
        per_replica = jax.vmap(function, jax.tree.map(lambda has: 0 if has else None, has_replicas))
        specs = jax.tree.map(specs_with_replicas, in_specs, has_replicas)
        axes = {REPLICA_AXIS, *MANUAL_AXES}
        results = shard_map(per_replica, axes, specs, jax.tree.map(with_replicas, out_specs))(*arguments)
        return results, jax.tree.map(lambda _: True, results)

    return call_mapped


def specs_with_replicas(spec: PartitionSpec, has_replicas: Any) -> Any:
    """`spec` for each array that it covers, with the replicas in front where the array has them."""
    return jax.tree.map(lambda has: with_replicas(spec) if has else spec, has_replicas)


def with_replicas(spec: PartitionSpec) -> PartitionSpec:
    """`spec` of an array with one more dimension in front, the replicas."""
    return PartitionSpec(REPLICA_AXIS, *spec)
