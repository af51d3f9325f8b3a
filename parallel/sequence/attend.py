"""Attention over global arrays whose rows are sharded over the `seq` axis: one of three strategies in a `shard_map`.

The map is manual in every axis that shards an activation, rows over data x fsdp and heads over tensor. So the
partitioner gathers nothing, and devices may differ in a kernel's control flow. Forward and backward pass are a map
each: between them are global arrays with names, which a memory policy can keep or offload, and no map is ever
differentiated (inside a pipeline's map JAX 0.10 cannot do that).

An implementation that `needs_all_axes_manual` gets a map that is manual in all axes; over those that shard no
activation its arrays are replicated. A map around it must not check over which axes arrays vary (`check_vma`), because
this one does not say; the pipeline's does not.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from ...configs.errors import UserError
from ...models.attention.interface import Implementation, Mask, TokenIndices
from ...models.attention.interface import attend as attend_with
from ..sharding import exclude_axes, manual_axes
from . import all_gather, ring, ulysses

STRATEGIES = {"all-gather": all_gather.wrap, "ring": ring.wrap, "ulysses": ulysses.wrap}
ROWS = ("data", "fsdp")


def sequence_parallel(implementation: Implementation, *, strategy: str, mesh: Mesh) -> Callable[..., jax.Array]:
    """`attend(q, k, v, mask, indices)` over global [batch, sequence, heads, head_dim] arrays, sharded over `mesh`.

    Tokens are in run order (`token_order.py`); `indices.query_index = indices.key_index` is that order, None is plain
    order. If `seq` is 1, nothing is communicated. The result equals that of one device. Raises UserError for an unknown
    strategy, a sequence that `mesh.seq` does not divide, and if the strategy or the implementation refuses.
    """
    if strategy not in STRATEGIES:
        raise UserError.no_match("sequence.parallel", [strategy], candidates=STRATEGIES)
    unsharded = mesh.shape["seq"] == 1
    local = implementation if unsharded else STRATEGIES[strategy](implementation, mesh_axis="seq")
    mapped = _over_devices(local, mesh)
    needs_indices = not unsharded and strategy != "ulysses"

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, indices: TokenIndices) -> jax.Array:
        _check_divisible(q, k, mesh)
        if indices.query_index is None and needs_indices:  # a shard of a row does not start at token 0
            order = jnp.arange(q.shape[1], dtype=jnp.int32)
            indices = dataclasses.replace(indices, query_index=order, key_index=order)
        k, v = (repeat_kv_heads(x, mesh.shape["tensor"]) for x in (k, v))
        return attend_with(mapped, q, k, v, mask, indices)

    return attend


def repeat_kv_heads(x: jax.Array, devices: int) -> jax.Array:
    """Keys or values [batch, keys, kv_heads, head_dim], each head repeated so that `devices` divides their number."""
    kv_heads = x.shape[2]
    return x if kv_heads % devices == 0 else jnp.repeat(x, math.lcm(kv_heads, devices) // kv_heads, axis=2)


class _Specs(NamedTuple):
    """Specs of [batch, sequence, heads, head_dim], of statistics [batch, sequence, heads], and of `indices`."""

    heads: PartitionSpec
    statistics: PartitionSpec
    indices: TokenIndices
    axes: set[str]  # manual


def _over_devices(local: Implementation, mesh: Mesh) -> Implementation:
    """`local`, which works on one device's shard, over global arrays."""

    def run(function, arrays, indices: TokenIndices, inputs: list[str], outputs: list[str]):
        def run_mapped(axes, *arrays, indices: TokenIndices):
            specs = _specs(arrays[0], indices, mesh, axes)
            remaining = set(mesh.axis_names) - manual_axes()
            return jax.shard_map(
                function,
                # Inside another shard_map (a pipeline) the mesh is the one already in use, some of its axes manual.
                mesh=mesh if jax.sharding.get_abstract_mesh().empty else None,
                in_specs=(*(getattr(specs, name) for name in inputs), specs.indices),
                out_specs=tuple(getattr(specs, name) for name in outputs),
                axis_names=remaining if local.needs_all_axes_manual else specs.axes,
                check_vma=not local.needs_all_axes_manual,
            )(*arrays, indices)

        return fold_replicas_into_rows(run_mapped)(arrays, indices)

    def forward(q, k, v, mask: Mask, indices: TokenIndices):
        def function(q, k, v, indices):
            return local.forward(q, k, v, mask, indices)

        return run(function, (q, k, v), indices, ["heads"] * 3, ["heads", "statistics"])

    def backward(q, k, v, out, lse, d_out, mask: Mask, indices: TokenIndices):
        def function(q, k, v, out, lse, d_out, indices):
            return local.backward(q, k, v, out, lse, d_out, mask, indices)

        inputs = [*["heads"] * 4, "statistics", "heads"]
        return run(function, (q, k, v, out, lse, d_out), indices, inputs, ["heads"] * 3)

    return local._replace(forward=forward, backward=backward)


def fold_replicas_into_rows(run: Callable[..., tuple[jax.Array, ...]]) -> Callable[..., tuple[jax.Array, ...]]:
    """`run(axes, *arrays, indices)` on arrays [rows, ...]; under `jax.vmap` on the rows of all replicas at once.

    The map then shards rows over one more axis. The partitioner would gather that axis wherever the map communicates
    over another one.
    """
    run_once = jax.custom_batching.custom_vmap(lambda arrays, indices: run(ROWS, *arrays, indices=indices))

    @run_once.def_vmap
    def run_replicas(count, batched, arrays, indices):
        def fold(leaf: jax.Array, is_batched: bool) -> jax.Array:
            if leaf.ndim == 1:  # token indices, the same for all
                return leaf
            replicas = leaf if is_batched else jnp.broadcast_to(leaf, (count, *leaf.shape))
            return replicas.reshape(-1, *replicas.shape[2:])

        arrays, indices = jax.tree.map(fold, (arrays, indices), tuple(batched))
        results = run(("replica", *ROWS), *arrays, indices=indices)
        return tuple(result.reshape(count, -1, *result.shape[1:]) for result in results), (True,) * len(results)

    return run_once


def _specs(q, indices: TokenIndices, mesh: Mesh, axes: tuple[str, ...]) -> _Specs:
    automatic = exclude_axes(axes, manual_axes()) or ()  # inside a pipeline's map rows are already split
    divides = q.shape[0] % math.prod(mesh.shape[axis] for axis in automatic) == 0
    rows = automatic if automatic and divides else None
    return _Specs(
        heads=PartitionSpec(rows, "seq", "tensor", None),
        statistics=PartitionSpec(rows, "seq", "tensor"),
        indices=jax.tree.map(lambda x: PartitionSpec("seq") if x.ndim == 1 else PartitionSpec(rows, "seq"), indices),
        axes={*(rows or ()), "seq", "tensor"},
    )


def _check_divisible(q, k, mesh: Mesh) -> None:
    ranks, tensor = mesh.shape["seq"], mesh.shape["tensor"]
    if q.shape[1] % ranks or k.shape[1] % ranks:
        raise UserError(
            f"mesh.seq: {ranks}, which does not divide {q.shape[1]} queries and {k.shape[1]} keys; "
            "use a data.sequence_length that it divides"
        )
    if q.shape[2] % tensor:
        raise UserError(
            f"mesh.tensor: {tensor}, which does not divide {q.shape[2]} heads; use a divisor of model.heads"
        )
