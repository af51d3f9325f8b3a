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

from .optimizer import Exchange, Params
from .pairs import matchings
from .wire import WIRES, Wire

AXIS = "replica"


def exchange(wire: str, *, replicas: int, mesh: Mesh | None = None) -> Exchange:
    """Between the `replicas` rows of every array; over `mesh` where its `replica` axis cuts them."""
    chosen = WIRES[wire]
    across = mesh is not None and mesh.shape[AXIS] > 1
    gather = functools.partial(gathered, mesh=mesh) if across else lambda tree: tree
    trade = functools.partial(traded, mesh=mesh) if across else picked

    def mean(tree: Params) -> Params:
        if wire == "float32":
            return jax.tree.map(lambda leaf: leaf.astype(jnp.float32).mean(axis=0), tree)
        return jax.tree.map(lambda leaf: travelled(chosen, leaf, gather).mean(axis=0), tree)

    def swap(tree: Params, row: jax.Array) -> Params:
        table = matchings(replicas)
        return jax.tree.map(lambda leaf: travelled(chosen, leaf, lambda coded: trade(coded, table, row)), tree)

    return Exchange(mean, swap)


def travelled(wire: Wire, leaf: jax.Array, move: Callable) -> jax.Array:
    """What arrives of `leaf` [replica, ...] when its codes are moved, float32. Scalars travel as arrays of one."""
    if leaf.ndim == 1:
        return travelled(wire, leaf[:, None], move)[:, 0]
    return wire.decode(move(wire.encode(leaf)), leaf.shape[-1])


def gathered(tree: Params, *, mesh: Mesh) -> Params:
    """Every replica's rows on every replica, and not a bit wider than they are."""

    def one(leaf: jax.Array) -> jax.Array:
        rest = [PartitionSpec.UNCONSTRAINED] * (leaf.ndim - 1)
        own = jax.lax.with_sharding_constraint(leaf, PartitionSpec(AXIS, *rest))
        return jax.lax.with_sharding_constraint(own, PartitionSpec(None, *rest))

    del mesh
    return jax.tree.map(one, tree)


def traded(tree: Params, table, row: jax.Array, *, mesh: Mesh) -> Params:
    """Each replica's partner's rows, by row `row` of `table` [rows, replica]; one permutation, chosen at run time."""

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
