"""Attention over global arrays whose rows are cut over the `seq` axis: one of three strategies inside of a `shard_map`.

The map is manual in every axis that shards an activation, rows over data x fsdp and heads over tensor, so that nothing
is left for the partitioner to gather, and a kernel's control flow is one device's own business. Forward and backward
pass are a map each: what is kept between them are whole arrays with names, where a memory policy finds them, and no map
is ever differentiated (inside of a pipeline's map JAX 0.10 cannot).
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

    Tokens stand in run order (`parallel/sequence/token_order.py`); `indices.query_index = indices.key_index` is that
    order; None is plain order. Where `seq` is 1 nothing is communicated. The result equals the implementation's on one
    device. Raises UserError on an unknown strategy, a sequence that `mesh.seq` does not divide, and where the strategy
    or the implementation refuses.
    """
    if strategy not in STRATEGIES:
        raise UserError.no_match("sequence.parallel", [strategy], candidates=STRATEGIES)
    whole_rows = mesh.shape["seq"] == 1
    local = implementation if whole_rows else STRATEGIES[strategy](implementation, mesh_axis="seq")
    mapped = _mapped(local, mesh)
    starts_anywhere = not whole_rows and strategy != "ulysses"

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, indices: TokenIndices) -> jax.Array:
        _check_cut(q, k, mesh)
        if indices.query_index is None and starts_anywhere:  # a part of a row does not start at 0
            order = jnp.arange(q.shape[1], dtype=jnp.int32)
            indices = dataclasses.replace(indices, query_index=order, key_index=order)
        k, v = (repeated_heads(x, mesh.shape["tensor"]) for x in (k, v))
        return attend_with(mapped, q, k, v, mask, indices)

    return attend


def repeated_heads(x: jax.Array, devices: int) -> jax.Array:
    """Keys or values [batch, keys, kv_heads, head_dim], each head repeated until `devices` can share them evenly."""
    kv_heads = x.shape[2]
    return x if kv_heads % devices == 0 else jnp.repeat(x, math.lcm(kv_heads, devices) // kv_heads, axis=2)


class _Specs(NamedTuple):
    """How arrays are cut: [batch, sequence, heads, head_dim], statistics [batch, sequence, heads], and `indices`."""

    heads: PartitionSpec
    statistics: PartitionSpec
    indices: TokenIndices
    axes: set[str]


def _mapped(local: Implementation, mesh: Mesh) -> Implementation:
    """`local`, which works on one device's part, over global arrays."""

    def over_devices(function, axes, arguments, indices: TokenIndices, cut, results):
        specs = _specs(arguments[0], indices, mesh, axes)
        return jax.shard_map(
            function,
            # Inside another shard_map (a pipeline) the mesh is the one already in use, some of its axes manual.
            mesh=mesh if jax.sharding.get_abstract_mesh().empty else None,
            in_specs=(*(getattr(specs, name) for name in cut), specs.indices),
            out_specs=tuple(getattr(specs, name) for name in results),
            axis_names=specs.axes,
        )(*arguments, indices)

    def forward(q, k, v, mask: Mask, indices: TokenIndices):
        def part(q, k, v, indices):
            return local.forward(q, k, v, mask, indices)

        def run(axes, *arguments, indices: TokenIndices):
            return over_devices(part, axes, arguments, indices, ["heads"] * 3, ("heads", "statistics"))

        return more_rows_for_replicas(run)((q, k, v), indices)

    def backward(q, k, v, out, lse, d_out, mask: Mask, indices: TokenIndices):
        def part(q, k, v, out, lse, d_out, indices):
            return local.backward(q, k, v, out, lse, d_out, mask, indices)

        def run(axes, *arguments, indices: TokenIndices):
            cut = [*["heads"] * 4, "statistics", "heads"]
            return over_devices(part, axes, arguments, indices, cut, ["heads"] * 3)

        return more_rows_for_replicas(run)((q, k, v, out, lse, d_out), indices)

    return local._replace(forward=forward, backward=backward)


def more_rows_for_replicas(run: Callable[..., tuple[jax.Array, ...]]) -> Callable[..., tuple[jax.Array, ...]]:
    """`run(axes, *arrays, indices)` on arrays [rows, ...], which under `jax.vmap` gets all replicas' rows as its own.

    To the map they are rows cut over one more axis. Left to the partitioner, that axis would be gathered wherever the
    map communicates over another one.
    """
    alone = jax.custom_batching.custom_vmap(lambda arrays, indices: run(ROWS, *arrays, indices=indices))

    @alone.def_vmap
    def together(count, batched, arrays, indices):
        def folded(leaf: jax.Array, by_replica: bool) -> jax.Array:
            if leaf.ndim == 1:  # indices of tokens, the same for all
                return leaf
            full = leaf if by_replica else jnp.broadcast_to(leaf, (count, *leaf.shape))
            return full.reshape(-1, *full.shape[2:])

        arrays, indices = jax.tree.map(folded, (arrays, indices), tuple(batched))
        results = run(("replica", *ROWS), *arrays, indices=indices)
        return tuple(one.reshape(count, -1, *one.shape[1:]) for one in results), (True,) * len(results)

    return alone


def _specs(q, indices: TokenIndices, mesh: Mesh, axes: tuple[str, ...]) -> _Specs:
    free = exclude_axes(axes, manual_axes()) or ()  # inside a pipeline's map rows are cut already
    rows = free if free and q.shape[0] % math.prod(mesh.shape[axis] for axis in free) == 0 else None
    return _Specs(
        heads=PartitionSpec(rows, "seq", "tensor", None),
        statistics=PartitionSpec(rows, "seq", "tensor"),
        indices=jax.tree.map(lambda x: PartitionSpec("seq") if x.ndim == 1 else PartitionSpec(rows, "seq"), indices),
        axes={*(rows or ()), "seq", "tensor"},
    )


def _check_cut(q, k, mesh: Mesh) -> None:
    ranks, tensor = mesh.shape["seq"], mesh.shape["tensor"]
    if q.shape[1] % ranks or k.shape[1] % ranks:
        raise UserError(
            f"mesh.seq: {ranks} devices cannot share {q.shape[1]} queries and {k.shape[1]} keys evenly; "
            "use a data.sequence_length that it divides"
        )
    if q.shape[2] % tensor:
        raise UserError(f"mesh.tensor: {tensor} devices cannot share {q.shape[2]} heads evenly; use a divisor of heads")
