"""The executor: one program that runs any table, as a gradient engine.

A `shard_map` over `pipe` and the batch axes holds one `scan` over the table's ticks. In a tick a device reads its own
row and runs the op there, over the repeats of the row's chunk; then all devices send their outputs to neighbours. The
other axes (tensor, seq) are left to the partitioner.

An op runs in a loop of one or no rounds (`run_if`), not in a branch: XLA updates a loop's carry in place, but copies
everything that passes through a branch, which would be all pools and all gradients in every tick. Weights are cast and
gathered once, before the first tick; gradients are added up where they are made and reduced over the batch axes once,
after the last tick. What a tick reads of earlier ones is in the pools of `tables/lowering.py`, so memory does not grow
with the number of microbatches.

No collective-permute may be inside a loop that some devices skip. So no ring attention in a stage;
`parallel/hlo/collectives.py` searches the compiled program for one that the partitioner made.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from ...sharding import path_name, weight_spec
from ..tables.lowering import DIRECTIONS, LoweredTable
from . import slot_pools
from .backward_split import BackwardSplit, SavedValues, split_backward
from .device import OP_FUNCTIONS, PipelineDevice
from .device_map import map_over_devices
from .embed_head import ReplicatedEmbedHead
from .replica_routing import exchange_rows, route_batch, route_fields
from .stage_functions import (
    BATCH_AXES,
    HIDDEN_DIMENSIONS,
    MANUAL_AXES,
    Carry,
    Row,
    StageFunctions,
    Weights,
    run_if_with_barrier,
    store_message,
)
from .vocab_parallel import VocabParallelEmbedHead

Metrics = dict[str, jax.Array]
# weights, frozen, batch, keys, table fields, shifts -> loss, weight, gradient, metrics
PipelineEngine = Callable[..., tuple[jax.Array, jax.Array, Weights, Metrics]]
Route = Callable[[jax.Array, jax.Array], jax.Array]  # this replica's output, shift -> the other replica's output


def pipeline_engine(
    functions: StageFunctions, lowered: LoweredTable, *, repeats: int, mesh: Mesh, zero: int, dtype: Any = jnp.float32
) -> PipelineEngine:
    """`run(weights, frozen, batch, keys, lowered.fields) -> loss, weight, gradient, metrics`: global sums.

    Stacked weights are [pipe * chunks * `repeats`, ...] in the order of devices, chunks, repeats. `batch` is a dict of
    [global_batch, sequence]; `keys` [global_batch] or None. Gradients are `dtype`, sharded like their weights; a table
    without a backward pass gives (). `shifts` route microbatches through replicas (`replica_routing.py`).
    """
    vocab_parallel = lowered.vocab_exchanges is not None

    def run(
        weights: Weights, frozen: Weights, batch: Any, keys: Any, table_fields: Row, shifts: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, Weights, Metrics]:
        spec_of = partial(unstacked_spec, vocab_parallel=vocab_parallel)
        stacked = jax.tree_util.tree_map_with_path(partial(stacked_spec, mesh=mesh, zero=zero), weights.stacked)
        unstacked = jax.tree_util.tree_map_with_path(spec_of, weights.unstacked)
        frozen_unstacked = jax.tree_util.tree_map_with_path(spec_of, frozen.unstacked)
        pipe, rows, replicated = PartitionSpec("pipe"), PartitionSpec(BATCH_AXES), PartitionSpec()
        gradient = Weights(stacked, unstacked)
        mapped = map_over_devices(
            partial(run_on_device, functions, lowered, repeats=repeats, dtype=dtype, specs=gradient, mesh=mesh),
            in_specs=(Weights(pipe, unstacked), Weights(pipe, frozen_unstacked), rows, rows, replicated, replicated),
            out_specs=(replicated, replicated, gradient if lowered.trains else replicated, replicated),
            mesh=mesh,
        )
        return mapped(weights, frozen, batch, keys, table_fields, shifts)

    return run


def stacked_spec(path: tuple[Any, ...], leaf: Any, *, mesh: Mesh, zero: int) -> PartitionSpec:
    """The output spec of a stacked gradient: over `pipe` and, if its weight is sharded so, over `fsdp`."""
    spec = weight_spec("segments/" + path_name(path), leaf.shape, mesh=mesh, zero=zero)
    return PartitionSpec("pipe", *(axes if axes in MANUAL_AXES else None for axes in spec[1:]))


def unstacked_spec(path: tuple[Any, ...], leaf: Any, *, vocab_parallel: bool) -> PartitionSpec:
    """The spec of an unstacked weight and its gradient: replicated, or its vocabulary over `pipe`."""
    del leaf
    vocabulary = {"embed/embedding": 0, "head/kernel": 1}.get(path_name(path)) if vocab_parallel else None
    return PartitionSpec() if vocabulary is None else PartitionSpec(*[None] * vocabulary, "pipe")


def run_on_device(
    functions: StageFunctions, lowered: LoweredTable, weights: Weights, frozen: Weights, batch: Any, keys: Any,
    table_fields: Row, shifts: jax.Array | None, *, repeats: int, dtype: Any, specs: Weights, mesh: Mesh,
) -> tuple[jax.Array, jax.Array, Any, Metrics]:  # fmt: skip
    """Run the table on one device, then reduce."""
    table = lowered.table
    batch, keys = split_microbatches((batch, keys), table.microbatches)
    route = None
    if shifts is not None:
        batch, keys = route_batch((batch, keys), shifts, table, mesh=mesh)
        table_fields, route = route_fields(table_fields, shifts, table), partial(exchange_rows, mesh=mesh)
    block, x = split_block(functions, weights, frozen, batch, keys)
    exchanges = lowered.vocab_exchanges
    embed_head = ReplicatedEmbedHead() if exchanges is None else VocabParallelEmbedHead(exchanges, table)
    device = PipelineDevice(functions, lowered, block, weights, frozen, batch, keys, embed_head, repeats)
    carry = run_table(device, x, table_fields, route, dtype=dtype)
    loss, weight, metrics = jax.lax.psum((carry.loss, carry.weight, carry.metrics), ("pipe", *BATCH_AXES))
    return loss, weight, jax.tree.map(reduce_gradient, carry.gradient, specs) if lowered.trains else (), metrics


def split_microbatches(rows: Any, count: int) -> Any:
    """Arrays [rows, ...] as [microbatches, rows, ...].

    Microbatch i takes rows i, i + count, ... as gradient accumulation does: no row moves to another device.
    """
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf.reshape(-1, count, *leaf.shape[1:]), 1, 0), rows)


def run_table(
    device: PipelineDevice, x: jax.ShapeDtypeStruct, table_fields: Row, route: Route | None, *, dtype: Any
) -> Carry:
    """The carry after the last tick; `x` is the shape of what passes between stages."""
    return jax.lax.scan(partial(run_tick, device, route), initial_carry(device, x, dtype=dtype), table_fields)[0]


def split_block(
    functions: StageFunctions, weights: Weights, frozen: Weights, batch: Any, keys: Any
) -> tuple[BackwardSplit, jax.ShapeDtypeStruct]:
    """The block in its parts, and the shape of what passes between stages, for arrays (or shapes) of one device.

    `batch` and `keys` have leading [microbatches, rows].
    """
    first = partial(jax.tree.map, lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype))
    fields, key, layer = first(batch), first(keys), first((weights.stacked, frozen.stacked))
    context = jax.eval_shape(functions.context, frozen.unstacked, fields, key)
    x = functions.hidden_shape(fields)
    return split_backward(functions.block, *layer, (context, jax.ShapeDtypeStruct((), jnp.int32)), x), x


def initial_carry(device: PipelineDevice, x: jax.ShapeDtypeStruct, *, dtype: Any) -> Carry:
    """The carry before the first tick; `x` is the shape of what passes between stages."""
    constrain, slots = device.functions.constrain, device.lowered.slots
    messages = jnp.zeros((slots["messages"] + 1, *x.shape), x.dtype)
    shapes = device.block.shapes if device.lowered.trains else SavedValues([], [], [])
    saved = [
        [slot_pools.empty_pool(value, slots=slots[pool], repeats=device.repeats) for value in values]
        for pool, values in shapes._asdict().items()
    ]
    trained = device.weights if device.lowered.trains else ()
    sum_dtype = jnp.promote_types(dtype, jnp.float32)
    metrics = device.embed_head.metrics(device, x)
    return Carry(
        output=constrain(jnp.zeros(x.shape, x.dtype), HIDDEN_DIMENSIONS),
        messages=constrain(messages, (None, *HIDDEN_DIMENSIONS)),
        saved=SavedValues(*saved),
        gradient=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype), trained),
        loss=jnp.zeros((), sum_dtype),
        weight=jnp.zeros((), sum_dtype),
        metrics={name: jnp.zeros(metric.shape, sum_dtype) for name, metric in metrics.items()},
        head_state=device.embed_head.initial_state(device, x, sum_dtype),
    )


def run_tick(device: PipelineDevice, route: Route | None, carry: Carry, table_fields: Row) -> tuple[Carry, None]:
    """Run the op in this device's row, then send its output; `route`, if given, sends it through another replica."""
    rank = jax.lax.axis_index("pipe")
    row = {name: field if field.ndim == 0 else field[rank] for name, field in table_fields.items()}
    carry = device.embed_head.before_tick(device, row, carry)
    functions = OP_FUNCTIONS | device.embed_head.op_functions()
    for op in sorted(device.lowered.ops & functions.keys()):
        carry = run_if_with_barrier(row["op"] == op, partial(functions[op], device), row, carry)
    if route is not None:
        carry = carry._replace(output=route(carry.output, row["shift"]))
    carry = carry._replace(messages=deliver_messages(device.lowered, row, carry))
    return device.embed_head.after_tick(device, row, carry), None


def deliver_messages(lowered: LoweredTable, row: Row, carry: Carry) -> jax.Array:
    """The messages after all devices have sent `output` to their neighbours."""
    devices, messages = lowered.table.devices, carry.messages
    for direction, step in DIRECTIONS.items():
        if direction in lowered.directions:
            pairs = [(source, (source + step) % devices) for source in range(devices)]
            received = carry.output if step == 0 else jax.lax.ppermute(carry.output, "pipe", pairs)
            messages = store_message(messages, row[direction], received)
    return messages


def reduce_gradient(gradient: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The sum over the batch axes, and over `pipe` where every device holds it; of what `fsdp` shards, our shard."""
    if "fsdp" in spec:
        dimension = tuple(spec).index("fsdp")
        gradient = jax.lax.psum_scatter(gradient, "fsdp", scatter_dimension=dimension, tiled=True)
    return jax.lax.psum(gradient, tuple(axis for axis in ("pipe", *BATCH_AXES) if axis not in spec))
