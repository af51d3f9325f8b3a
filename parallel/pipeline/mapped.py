"""The engine's `shard_map`: over `pipe` and the batch axes, and over `replica` too where `jax.vmap` lifts it.

The map takes `replica` itself because the maps inside of it (attention, routing) need that axis. A nested map must not
take an axis that stands before one of its parent's in the mesh: XLA of JAX 0.12 lists the axes of both in the order of
nesting, expects the order of the mesh, and aborts the process ("Manual axes must be sorted by mesh axis index").
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from .parts import MANUAL

REPLICA = "replica"


def over_devices(function: Callable[..., Any], *, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`function(*arguments)` of what each device has by the specs, which speak of the axes in `MANUAL` only.

    Under `jax.vmap` each device has its own replicas' arrays; what is not mapped is the same for all replicas.
    """

    def mapped(function: Callable[..., Any], axes: set[str], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        return jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False
        )

    @jax.custom_batching.custom_vmap
    def one(*arguments: Any) -> Any:
        return mapped(function, MANUAL, in_specs, out_specs)(*arguments)

    @one.def_vmap
    def several(count: int, lifted: Any, *arguments: Any) -> tuple[Any, Any]:
        del count
        lifted = tuple(lifted)  # for each array of `arguments`, whether it has a dimension of replicas
        each = jax.vmap(function, jax.tree.map(lambda has: 0 if has else None, lifted))
        axes, entering = {REPLICA, *MANUAL}, jax.tree.map(entering_specs, in_specs, lifted)
        results = mapped(each, axes, entering, jax.tree.map(by_replica, out_specs))(*arguments)
        return results, jax.tree.map(lambda _: True, results)

    return one


def entering_specs(spec: PartitionSpec, lifted: Any) -> Any:
    """What `spec` becomes for each array that it is of."""
    return jax.tree.map(lambda has: by_replica(spec) if has else spec, lifted)


def by_replica(spec: PartitionSpec) -> PartitionSpec:
    """`spec` of an array that has one more dimension in front, the replicas."""
    return PartitionSpec(REPLICA, *spec)
