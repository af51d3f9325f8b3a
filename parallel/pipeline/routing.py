"""NoLoCo's routing: behind every stage a microbatch goes on in a replica drawn by a seed that all share.

Replicas then train on each other's outputs, and their stages stay closer without an exchange of weights. For every
microbatch and every boundary between two stages one number is drawn, 0 <= shift < R, uniform:

    replica r of stage s  ->  replica r xor shift of stage s + 1          gradients come back the same way

The exclusive or is a permutation of R = 2^n replicas and its own inverse: replicas swap in pairs, and a gradient needs
no other table than an activation. Any replica is as likely as any other, and boundaries are independent of each other;
of all R! permutations these are R, because a device sends by patterns that the compiler must know: one for each bit of
the shift, n in all, each used or not.

What a stage reads of a microbatch's fields (positions, documents, targets) must be those of the rows it is sent, so
they travel along: by the bits of all shifts up to the stage, once, before the first tick.
Source: NoLoCo, arXiv:2506.10911, section 3.2; the restriction to exclusive ors is ours.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from .mapped import REPLICA
from .parts import Row
from .table import Op, Table


def drawn(key: jax.Array, *, microbatches: int, stages: int, replicas: int) -> jax.Array:
    """The shift of every microbatch behind every stage, int32 [microbatches, stages]; 0 behind the last one."""
    shifts = jax.random.randint(key, (microbatches, stages), 0, replicas)
    return jnp.where(jnp.arange(stages) == stages - 1, 0, shifts)


def origins(shifts: jax.Array) -> jax.Array:
    """Whose rows a stage works on: at [microbatch, stage] replica r has those of replica r xor this."""
    behind = jax.lax.associative_scan(jnp.bitwise_xor, shifts, axis=1)
    return behind ^ shifts


def routed_rows(rows: Row, shifts: jax.Array, table: Table) -> Row:
    """The table's rows with the `shift` of what is sent in a tick, and with `microbatch` as `routed_batch` counts."""
    stage = table.placement[np.arange(table.devices), np.maximum(table.chunk, 0)]
    boundary = np.where(table.op == Op.F, stage, stage - 1)  # -1 before the first stage: the column of zeros
    microbatch = jnp.asarray(rows["microbatch"])
    own = jnp.asarray(rows["chunk"]) * table.microbatches + microbatch
    return {**rows, "shift": shifts[microbatch, boundary], "microbatch": own}


def routed_batch(batch: Any, shifts: jax.Array, table: Table, *, mesh: Mesh) -> Any:
    """On one device: [microbatches, ...] -> [chunks * microbatches, ...], for each stage the rows that it is sent."""
    stages = jnp.asarray(table.placement)[jax.lax.axis_index("pipe")]
    whose = origins(shifts).T[stages]  # [chunks, microbatches]

    def one(leaf: jax.Array) -> jax.Array:
        every = jnp.broadcast_to(leaf, (table.chunks, *leaf.shape)).reshape(-1, *leaf.shape[1:])
        return exchanged(every, whose.reshape(-1), mesh=mesh)

    return jax.tree.map(one, batch)


def exchanged(own: jax.Array, shift: jax.Array, *, mesh: Mesh) -> jax.Array:
    """What replica r xor `shift` has in the place of `own`, under `jax.vmap` over the replicas; without it, `own`.

    `shift` is the same for all replicas: [], or with leading dimensions of `own`.
    """

    @jax.custom_batching.custom_vmap
    def one(own: jax.Array, shift: jax.Array) -> jax.Array:
        del shift
        return own

    @one.def_vmap
    def several(count: int, mapped: list[bool], own: jax.Array, shift: jax.Array) -> tuple[jax.Array, bool]:
        if not mapped[0]:
            return own, False
        replicas = count * mesh.shape[REPLICA]
        for bit in (1 << number for number in range((replicas - 1).bit_length())):
            swap = ((shift & bit) != 0).reshape(1, *shift.shape, *[1] * (own.ndim - 1 - shift.ndim))
            own = jnp.where(swap, swapped(own, bit, mesh=mesh), own)
        return own, True

    return one(own, shift)


def swapped(own: jax.Array, bit: int, *, mesh: Mesh) -> jax.Array:
    """A device's replicas [replicas here, ...] with those of r and r xor `bit` in each other's place."""
    here = own.shape[0]
    if bit < here:
        return own[np.arange(here) ^ bit]
    pattern = [(source, source ^ bit // here) for source in range(mesh.shape[REPLICA])]
    return jax.lax.ppermute(own, REPLICA, pattern)
