"""The exchange between replicas that share a program: over the mesh axis `replica`, or on one device.

Arrays cross the axis in their wire format: each replica's codes and scales are gathered, and every replica decodes and
adds them in float32. In float32 nothing is coded, and the sum is an all-reduce. A swap sends each replica's codes to
its partner by one of the fixed patterns of `matchings.py`, so that it is a collective-permute and no more.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from .interface import Exchange, Params
from .matchings import matchings
from .wire_formats import WIRE_FORMATS, EncodedArray

REPLICA_AXIS = "replica"
WireNames = str | tuple[str, ...]


def make_exchange(wire: WireNames, *, replicas: int, mesh: Mesh | None = None) -> Exchange:
    """The exchange between the `replicas` rows of every array; over `mesh` if its `replica` axis shards them.

    `wire` is one format, or a tuple of them for a tuple of trees, all of which travel together.
    """
    sharded = mesh is not None and mesh.shape[REPLICA_AXIS] > 1
    gather = all_gather_replicas if sharded else lambda tree: tree
    permute = functools.partial(permute_sharded, mesh=mesh) if sharded else permute_rows

    def mean(tree: Params) -> Params:
        if wire == "float32":
            return jax.tree.map(lambda leaf: leaf.astype(jnp.float32).mean(axis=0), tree)
        return jax.tree.map(lambda leaf: leaf.mean(axis=0), send_coded(wire, tree, gather))

    def swap(tree: Params, row: jax.Array) -> Params:
        return send_coded(wire, tree, lambda coded: permute(coded, matchings(replicas), row))

    return Exchange(mean, swap)


def send_coded(wire: WireNames, tree: Params, send: Callable[[Params], Params]) -> Params:
    """What `send` delivers of the codes of arrays [replica, ...], decoded to float32. A scalar is an array of one."""
    wires = jax.tree.broadcast(wire, tree)

    def encode(name: str, leaf: jax.Array) -> EncodedArray:
        return WIRE_FORMATS[name].encode(leaf if leaf.ndim > 1 else leaf[:, None])

    def decode(name: str, leaf: jax.Array, coded: EncodedArray) -> jax.Array:
        return WIRE_FORMATS[name].decode(coded, leaf.shape[-1] if leaf.ndim > 1 else 1).reshape(leaf.shape)

    return jax.tree.map(decode, wires, tree, send(jax.tree.map(encode, wires, tree)))


def all_gather_replicas(tree: Params) -> Params:
    """Every replica's rows on every replica, in the dtype of `tree`."""

    def gather(leaf: jax.Array) -> jax.Array:
        other = [PartitionSpec.UNCONSTRAINED] * (leaf.ndim - 1)
        # The first constraint keeps the compiler from gathering before the codes are narrow.
        local = jax.lax.with_sharding_constraint(leaf, PartitionSpec(REPLICA_AXIS, *other))
        return jax.lax.with_sharding_constraint(local, PartitionSpec(None, *other))

    return jax.tree.map(gather, tree)


def permute_sharded(tree: Params, table, row: jax.Array, *, mesh: Mesh) -> Params:
    """Each replica's partner's values, by row `row` of `table` [rows, replica]; one permutation, chosen at run time.

    There may be one of these in a program, and no other message that does not wait for it. XLA:CPU (jaxlib 0.10.2)
    runs messages in one order on all devices, but a program that comes from the compilation cache has lost the order
    between what is inside a conditional and what is outside of it: devices then wait in different arrays' messages.
    """

    def permute_by(partners) -> Callable[[Params], Params]:
        pattern = [(int(source), target) for target, source in enumerate(partners)]
        return lambda shards: jax.lax.ppermute(shards, REPLICA_AXIS, pattern)

    def permute(shards: Params, row: jax.Array) -> Params:
        return jax.lax.switch(row, [permute_by(partners) for partners in table], shards)

    spec = jax.tree.map(lambda leaf: PartitionSpec(REPLICA_AXIS), tree)
    return jax.shard_map(
        permute, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec, axis_names={REPLICA_AXIS}
    )(tree, row)


def permute_rows(tree: Params, table, row: jax.Array) -> Params:
    """`permute_sharded` for replicas that are all on one device."""
    return jax.tree.map(lambda leaf: leaf[jnp.asarray(table)[row]], tree)
