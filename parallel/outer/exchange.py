"""How drifts travel between replicas that share a program: over the mesh axis `replica`, or on one device.

What crosses the axis is what the wire format has made of an array: each replica's codes and scales are gathered, and
decoded and added by everybody in float32. In float32 nothing is coded and the sum is an all-reduce. A swap sends each
replica's codes to its partner, by one of the fixed patterns of `pairs.py`, so that a pair exchange is a
collective-permute and no more.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from .interface import Exchange, Params
from .matchings import matchings
from .wire_formats import WIRES, Coded

AXIS = "replica"
Wires = str | tuple[str, ...]


def exchange(wire: Wires, *, replicas: int, mesh: Mesh | None = None) -> Exchange:
    """Between the `replicas` rows of every array; over `mesh` where its `replica` axis cuts them.

    `wire` is one format, or a tuple of them for a tuple of trees, all of which travel together.
    """
    across = mesh is not None and mesh.shape[AXIS] > 1
    gather = functools.partial(gathered, mesh=mesh) if across else lambda tree: tree
    trade = functools.partial(traded, mesh=mesh) if across else picked

    def mean(tree: Params) -> Params:
        if wire == "float32":
            return jax.tree.map(lambda leaf: leaf.astype(jnp.float32).mean(axis=0), tree)
        return jax.tree.map(lambda leaf: leaf.mean(axis=0), travelled(wire, tree, gather))

    def swap(tree: Params, row: jax.Array) -> Params:
        return travelled(wire, tree, lambda coded: trade(coded, matchings(replicas), row))

    return Exchange(mean, swap)


def travelled(wire: Wires, tree: Params, move: Callable[[Params], Params]) -> Params:
    """What arrives of arrays [replica, ...] when their codes are moved, float32. Scalars travel as arrays of one."""
    wires = jax.tree.broadcast(wire, tree)

    def encoded(name: str, leaf: jax.Array) -> Coded:
        return WIRES[name].encode(leaf if leaf.ndim > 1 else leaf[:, None])

    def decoded(name: str, leaf: jax.Array, coded: Coded) -> jax.Array:
        return WIRES[name].decode(coded, leaf.shape[-1] if leaf.ndim > 1 else 1).reshape(leaf.shape)

    return jax.tree.map(decoded, wires, tree, move(jax.tree.map(encoded, wires, tree)))


def gathered(tree: Params, *, mesh: Mesh) -> Params:
    """Every replica's rows on every replica, and not a bit wider than they are."""

    def one(leaf: jax.Array) -> jax.Array:
        rest = [PartitionSpec.UNCONSTRAINED] * (leaf.ndim - 1)
        own = jax.lax.with_sharding_constraint(leaf, PartitionSpec(AXIS, *rest))
        return jax.lax.with_sharding_constraint(own, PartitionSpec(None, *rest))

    del mesh
    return jax.tree.map(one, tree)


def traded(tree: Params, table, row: jax.Array, *, mesh: Mesh) -> Params:
    """Each replica's partner's rows, by row `row` of `table` [rows, replica]; one permutation, chosen at run time.

    There may be one of these in a program, and no other message that does not wait for it. XLA:CPU (jaxlib 0.10.2)
    runs messages in one order on all devices, but a program that comes from the compilation cache has lost the order
    between what is inside a conditional and what is outside of it: devices then met in different arrays' messages.
    """

    def along(partners) -> Callable[[Params], Params]:
        pattern = [(int(there), here) for here, there in enumerate(partners)]
        return lambda parts: jax.lax.ppermute(parts, AXIS, pattern)

    def here(parts: Params, row: jax.Array) -> Params:
        return jax.lax.switch(row, [along(partners) for partners in table], parts)

    spec = jax.tree.map(lambda leaf: PartitionSpec(AXIS), tree)
    return jax.shard_map(here, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec, axis_names={AXIS})(
        tree, row
    )


def picked(tree: Params, table, row: jax.Array) -> Params:
    """`traded` where all replicas are on one device."""
    return jax.tree.map(lambda leaf: leaf[jnp.asarray(table)[row]], tree)
