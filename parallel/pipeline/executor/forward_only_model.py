"""A model that goes forward only, such as a teacher: a pipeline of its own that returns the last hidden states.

    read = hidden_state_reader(functions, lowered, repeats=2, mesh=mesh)
    hidden = read(weights, batch)                               # [global_batch, sequence, embed]

Its layers are sharded over `pipe` like those of the trained model, so a device holds only its share of them. But the
hidden states of all microbatches wait on every device of the pipeline until the trained model's last stage reads them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from ..tables.lowering import LoweredTable
from .device import PipelineDevice
from .device_map import map_over_devices
from .embed_head import HiddenStateCollector
from .stage_functions import BATCH_AXES, Row, StageFunctions, Weights
from .table_executor import run_table, split_block, split_microbatches


def hidden_state_reader(
    functions: StageFunctions, lowered: LoweredTable, *, repeats: int, mesh: Mesh
) -> Callable[[Weights, Any], jax.Array]:
    """`read(weights, batch) -> hidden`, the input of the head; `lowered` is a forward-only table.

    Weights and `batch` are as in `table_executor.pipeline_engine`.
    """
    batch_spec = PartitionSpec(BATCH_AXES)

    def read(weights: Weights, batch: Any) -> jax.Array:
        return map_over_devices(
            partial(run_on_device, functions, lowered, repeats),
            in_specs=(Weights(PartitionSpec("pipe"), PartitionSpec()), batch_spec, PartitionSpec()),
            out_specs=batch_spec,
            mesh=mesh,
        )(weights, batch, lowered.fields)

    return read


def run_on_device(
    functions: StageFunctions, lowered: LoweredTable, repeats: int, weights: Weights, batch: Any, table_fields: Row
) -> jax.Array:
    """Run the table on one device: hidden states [rows, sequence, embed] of the device's rows."""
    batch, frozen = split_microbatches(batch, lowered.table.microbatches), Weights({}, {})
    block, x = split_block(functions, weights, frozen, batch, None)
    device = PipelineDevice(functions, lowered, block, weights, frozen, batch, None, HiddenStateCollector(), repeats)
    carry = run_table(device, x, table_fields, None, dtype=jnp.float32)
    hidden = jax.lax.psum(carry.head_state, "pipe")
    return jnp.moveaxis(hidden, 0, 1).reshape(-1, *hidden.shape[2:])
