"""A model that only reads, such as a teacher: its own pipeline, and what its last stage made of every token.

    hidden = reading(parts, wiring, repeats=2, mesh=mesh)(weights, batch)     # [global_batch, sequence, embed]

Its layers are cut over `pipe` as those of the model that learns, so it takes no more of a device than its share; but
what it makes waits on every device of the pipeline until that model's last stage asks for it: all microbatches at once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from .device import Device
from .ends import KeptEnds
from .engine import in_microbatches, ran, traced_block
from .mapped import over_devices
from .parts import BATCH_AXES, Parts, Row, Weights
from .wiring import Wiring, rows_of


def reading(parts: Parts, wiring: Wiring, *, repeats: int, mesh: Mesh) -> Callable[[Weights, Any], jax.Array]:
    """`read(weights, batch) -> hidden`, what the head would multiply; `wiring` is that of a forward-only table.

    Weights and `batch` are as in `engine.pipelined`.
    """
    spread = PartitionSpec(BATCH_AXES)

    def read(weights: Weights, batch: Any) -> jax.Array:
        return over_devices(
            partial(on_device, parts, wiring, repeats),
            in_specs=(Weights(PartitionSpec("pipe"), PartitionSpec()), spread, PartitionSpec()),
            out_specs=spread,
            mesh=mesh,
        )(weights, batch, rows_of(wiring))

    return read


def on_device(parts: Parts, wiring: Wiring, repeats: int, weights: Weights, batch: Any, rows: Row) -> jax.Array:
    """One device's run through the table: [rows, sequence, embed] of the rows it was given."""
    batch, frozen = in_microbatches(batch, wiring.table.microbatches), Weights({}, {})
    block, x = traced_block(parts, weights, frozen, batch, None)
    device = Device(parts, wiring, block, weights, frozen, batch, None, KeptEnds(), repeats)
    kept = jax.lax.psum(ran(device, x, rows, None, dtype=jnp.float32).between, "pipe")
    return jnp.moveaxis(kept, 0, 1).reshape(-1, *kept.shape[2:])
