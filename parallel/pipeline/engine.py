"""The engine: one program that runs any table, a gradient engine like the plain one.

A `shard_map` over `pipe` and the batch axes holds one `scan` over the table's ticks. In a tick a device looks up its
own row and does what it says, over the repeats of the chunk it names; then everybody hands what was made to a
neighbour. The other axes (tensor, seq) stay with the partitioner.

*Doing what the row says* is a loop that runs once or not at all (`when`), not a branch: XLA updates a loop's carry in
place, and copies everything that goes through a branch, which would be all pools and all gradients in every tick.
Weights are cast and gathered once, before the first tick; gradients are added up where they are made and reduced over
the batch axes once, after the last. What a tick reads of earlier ones is in the pools of `wiring.py`, so memory does
not grow with the number of microbatches.

No collective-permute may happen inside a loop that some devices skip: no ring attention in a stage, and
`parallel/hlo.py` reads the compiled program for one that the partitioner made.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from ..rules import path_name, weight_spec
from . import pools
from .device import PHASES, Device
from .ends import WholeEnds
from .mapped import over_devices
from .parts import BATCH_AXES, MANUAL, RESIDUAL, Carry, Parts, Row, Weights, filed, undivided
from .routing import exchanged, routed_batch, routed_rows
from .shared import SharedEnds
from .split import Saved, Split, split
from .wiring import Wiring

Metrics = dict[str, jax.Array]
Run = Callable[..., tuple[jax.Array, jax.Array, Weights, Metrics]]  # weights, frozen, batch, keys, rows, shifts
Route = Callable[[jax.Array, jax.Array], jax.Array]  # what is made here, shift -> what the other replica made


def pipelined(parts: Parts, wiring: Wiring, *, repeats: int, mesh: Mesh, zero: int, dtype: Any = jnp.float32) -> Run:
    """`run(weights, frozen, batch, keys, rows_of(wiring)) -> loss, weight, gradient, metrics`: global sums.

    Stacked weights are [pipe * chunks * `repeats`, ...] in the order of devices, chunks, repeats. `batch` is a dict of
    [global_batch, sequence]; `keys` [global_batch] or None. Gradients are `dtype`, sharded like their weights; of a
    table that only goes forward there are none. `shifts`, if given, send microbatches through replicas (`routing.py`).
    """
    shared = wiring.meetings is not None

    def run(
        weights: Weights, frozen: Weights, batch: Any, keys: Any, rows: Row, shifts: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, Weights, Metrics]:
        leaving = jax.tree_util.tree_map_with_path(partial(stacked_spec, mesh=mesh, zero=zero), weights.stacked)
        ends = jax.tree_util.tree_map_with_path(partial(end_spec, shared=shared), weights.ends)
        frozen_ends = jax.tree_util.tree_map_with_path(partial(end_spec, shared=shared), frozen.ends)
        cut = PartitionSpec("pipe")
        spread = PartitionSpec(BATCH_AXES)
        gradient, whole = Weights(leaving, ends), PartitionSpec()
        mapped = over_devices(
            partial(on_device, parts, wiring, repeats=repeats, dtype=dtype, specs=gradient, mesh=mesh),
            in_specs=(Weights(cut, ends), Weights(cut, frozen_ends), spread, spread, whole, whole),
            out_specs=(whole, whole, gradient if wiring.trains else whole, whole),
            mesh=mesh,
        )
        return mapped(weights, frozen, batch, keys, rows, shifts)

    return run


def stacked_spec(path: tuple[Any, ...], leaf: Any, *, mesh: Mesh, zero: int) -> PartitionSpec:
    """How a stacked gradient leaves: cut over `pipe` and, where its weight is, over `fsdp`."""
    spec = weight_spec("segments/" + path_name(path), leaf.shape, mesh=mesh, zero=zero)
    return PartitionSpec("pipe", *(axes if axes in MANUAL else None for axes in spec[1:]))


def end_spec(path: tuple[Any, ...], leaf: Any, *, shared: bool) -> PartitionSpec:
    """How a weight of the ends enters, and its gradient leaves: whole, or a `shared` vocabulary cut over `pipe`."""
    del leaf
    vocabulary = {"embed/embedding": 0, "head/kernel": 1}.get(path_name(path)) if shared else None
    return PartitionSpec() if vocabulary is None else PartitionSpec(*[None] * vocabulary, "pipe")


def on_device(
    parts: Parts, wiring: Wiring, weights: Weights, frozen: Weights, batch: Any, keys: Any, rows: Row,
    shifts: jax.Array | None, *, repeats: int, dtype: Any, specs: Weights, mesh: Mesh,
) -> tuple[jax.Array, jax.Array, Any, Metrics]:  # fmt: skip
    """One device's run through the table, and the reductions after it."""
    batch, keys = in_microbatches((batch, keys), wiring.table.microbatches)
    route = None
    if shifts is not None:
        batch, keys = routed_batch((batch, keys), shifts, wiring.table, mesh=mesh)
        rows, route = routed_rows(rows, shifts, wiring.table), partial(exchanged, mesh=mesh)
    block, x = traced_block(parts, weights, frozen, batch, keys)
    ends = WholeEnds() if wiring.meetings is None else SharedEnds(wiring.meetings, wiring.table)
    carry = ran(Device(parts, wiring, block, weights, frozen, batch, keys, ends, repeats), x, rows, route, dtype=dtype)
    everywhere = ("pipe", *BATCH_AXES)
    loss, weight, metrics = jax.lax.psum((carry.loss, carry.weight, carry.metrics), everywhere)
    return loss, weight, jax.tree.map(reduced, carry.gradient, specs) if wiring.trains else (), metrics


def in_microbatches(rows: Any, count: int) -> Any:
    """Arrays [rows, ...] as [microbatches, rows, ...].

    Microbatch i takes rows i, i + count, ... like plain accumulation does: every device keeps the rows it has.
    """
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf.reshape(-1, count, *leaf.shape[1:]), 1, 0), rows)


def ran(device: Device, x: jax.ShapeDtypeStruct, rows: Row, route: Route | None, *, dtype: Any) -> Carry:
    """What a device has after the last tick; `x` is the shape of what passes between stages."""
    return jax.lax.scan(partial(tick, device, route), empty(device, x, dtype=dtype), rows)[0]


def traced_block(
    parts: Parts, weights: Weights, frozen: Weights, batch: Any, keys: Any
) -> tuple[Split, jax.ShapeDtypeStruct]:
    """The block in its parts, and the shape of what passes between stages, for arrays (or shapes) of one device.

    `batch` and `keys` have leading [microbatches, rows].
    """
    first = partial(jax.tree.map, lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype))
    fields, key, layer = first(batch), first(keys), first((weights.stacked, frozen.stacked))
    context = (jax.eval_shape(parts.context, frozen.ends, fields, key), jax.ShapeDtypeStruct((), jnp.int32))
    x = parts.shape(fields)
    return split(parts.block, *layer, context, x), x


def empty(device: Device, x: jax.ShapeDtypeStruct, *, dtype: Any) -> Carry:
    """What the first tick begins with; `x` is the shape of what passes between stages."""
    constrain, slots = device.parts.constrain, device.wiring.slots
    messages = jnp.zeros((slots["messages"] + 1, *x.shape), x.dtype)
    kept = device.block.shapes if device.wiring.trains else Saved([], [], [])
    saved = [
        [pools.empty(one, slots=slots[name], repeats=device.repeats) for one in shapes]
        for name, shapes in kept._asdict().items()
    ]
    trained = device.weights if device.wiring.trains else ()
    sums = jnp.promote_types(dtype, jnp.float32)
    return Carry(
        out=constrain(jnp.zeros(x.shape, x.dtype), RESIDUAL),
        messages=constrain(messages, (None, *RESIDUAL)),
        saved=Saved(*saved),
        gradient=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype), trained),
        loss=jnp.zeros((), sums),
        weight=jnp.zeros((), sums),
        metrics={name: jnp.zeros(one.shape, sums) for name, one in device.ends.metrics(device, x).items()},
        between=device.ends.between(device, x, sums),
    )


def tick(device: Device, route: Route | None, carry: Carry, rows: Row) -> tuple[Carry, None]:
    """Do this device's row of the table, then pass on what was made; by way of another replica if there is `route`."""
    me = jax.lax.axis_index("pipe")
    row = {name: field if field.ndim == 0 else field[me] for name, field in rows.items()}
    carry = device.ends.before(device, row, carry)
    phases = PHASES | device.ends.phases()
    for op in sorted(device.wiring.ops & phases.keys()):
        carry = undivided(row["op"] == op, partial(phases[op], device), row, carry)
    if route is not None:
        carry = carry._replace(out=route(carry.out, row["shift"]))
    carry = carry._replace(messages=delivered(device.wiring, row, carry))
    return device.ends.after(device, row, carry), None


def delivered(wiring: Wiring, row: Row, carry: Carry) -> jax.Array:
    """The messages after everybody passed `out` to its neighbours."""
    devices, messages = wiring.table.devices, carry.messages
    for way, step in (("own", 0), ("from_before", 1), ("from_after", -1)):
        if way in wiring.ways:
            pairs = [(source, (source + step) % devices) for source in range(devices)]
            arrived = carry.out if step == 0 else jax.lax.ppermute(carry.out, "pipe", pairs)
            messages = filed(messages, row[way], arrived)
    return messages


def reduced(gradient: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The sum over the batch axes, and over `pipe` where every device holds it; of what `fsdp` cuts, our part."""
    if "fsdp" in spec:
        dimension = tuple(spec).index("fsdp")
        gradient = jax.lax.psum_scatter(gradient, "fsdp", scatter_dimension=dimension, tiled=True)
    return jax.lax.psum(gradient, tuple(axis for axis in ("pipe", *BATCH_AXES) if axis not in spec))
