"""NoLoCo's routing: after every stage a microbatch continues in a replica that is drawn by a shared seed.

Replicas then train on each other's outputs, and their stages stay closer without an exchange of weights. For every
microbatch and every boundary between two stages one uniform number is drawn, 0 <= shift < R:

    replica r of stage s  ->  replica r xor shift of stage s + 1          gradients return the same way

The exclusive or is a permutation of R = 2^n replicas and its own inverse: replicas swap in pairs, and a gradient needs
the same permutation as its activation. Every replica is equally likely, and boundaries are independent of each other.
Of all R! permutations these are only R, because the compiler must know each pattern of messages: there is one for each
bit of the shift, n in all, each used or not.

The fields of a microbatch that a stage reads (positions, documents, targets) must be those of the rows it receives, so
they are exchanged too: by the bits of all shifts up to the stage, once, before the first tick.
Source: NoLoCo, arXiv:2506.10911, section 3.2; the restriction to exclusive ors is ours.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ..tables.table import Op, Table
from .device_map import REPLICA_AXIS
from .stage_functions import Row


def draw_shifts(key: jax.Array, *, microbatches: int, stages: int, replicas: int) -> jax.Array:
    """The shift of every microbatch after every stage, int32 [microbatches, stages]; 0 after the last stage."""
    shifts = jax.random.randint(key, (microbatches, stages), 0, replicas)
    return jnp.where(jnp.arange(stages) == stages - 1, 0, shifts)


def source_shifts(shifts: jax.Array) -> jax.Array:
    """The rows that a stage works on: at [microbatch, stage] replica r has those of replica r xor this number."""
    inclusive = jax.lax.associative_scan(jnp.bitwise_xor, shifts, axis=1)
    return inclusive ^ shifts


def route_fields(table_fields: Row, shifts: jax.Array, table: Table) -> Row:
    """Table fields with the `shift` of each tick's message, and `microbatch` as an index into `route_batch`."""
    stage = table.placement[np.arange(table.devices), np.maximum(table.chunk, 0)]
    boundary = np.where(table.op == Op.F, stage, stage - 1)  # -1 before the first stage: the column of zeros
    microbatch = jnp.asarray(table_fields["microbatch"])
    index = jnp.asarray(table_fields["chunk"]) * table.microbatches + microbatch
    return {**table_fields, "shift": shifts[microbatch, boundary], "microbatch": index}


def route_batch(batch: Any, shifts: jax.Array, table: Table, *, mesh: Mesh) -> Any:
    """On one device: [microbatches, ...] -> [chunks * microbatches, ...], for each stage the rows that it receives."""
    stages = jnp.asarray(table.placement)[jax.lax.axis_index("pipe")]
    sources = source_shifts(shifts).T[stages]  # [chunks, microbatches]

    def route(leaf: jax.Array) -> jax.Array:
        repeated = jnp.broadcast_to(leaf, (table.chunks, *leaf.shape)).reshape(-1, *leaf.shape[1:])
        return exchange_rows(repeated, sources.reshape(-1), mesh=mesh)

    return jax.tree.map(route, batch)


def exchange_rows(rows: jax.Array, shift: jax.Array, *, mesh: Mesh) -> jax.Array:
    """The `rows` of replica r xor `shift`, under `jax.vmap` over the replicas; without it, `rows`.

    `shift` is the same for all replicas: [], or with leading dimensions of `rows`.
    """

    @jax.custom_batching.custom_vmap
    def exchange(rows: jax.Array, shift: jax.Array) -> jax.Array:
        del shift
        return rows

    @exchange.def_vmap
    def over_replicas(count: int, mapped: list[bool], rows: jax.Array, shift: jax.Array) -> tuple[jax.Array, bool]:
        if not mapped[0]:
            return rows, False
        replicas = count * mesh.shape[REPLICA_AXIS]
        for bit in (1 << number for number in range((replicas - 1).bit_length())):
            swap = ((shift & bit) != 0).reshape(1, *shift.shape, *[1] * (rows.ndim - 1 - shift.ndim))
            rows = jnp.where(swap, swap_replicas(rows, bit, mesh=mesh), rows)
        return rows, True

    return exchange(rows, shift)


def swap_replicas(rows: jax.Array, bit: int, *, mesh: Mesh) -> jax.Array:
    """A device's `rows` [replicas of this device, ...] with those of replicas r and r xor `bit` swapped."""
    count = rows.shape[0]
    if bit < count:
        return rows[np.arange(count) ^ bit]
    pattern = [(source, source ^ bit // count) for source in range(mesh.shape[REPLICA_AXIS])]
    return jax.lax.ppermute(rows, REPLICA_AXIS, pattern)
