"""Back from a checkpoint, whatever pipeline it was saved under.

Stacked arrays are saved in the order in which the run's pipeline held the layers; the checkpoint says which
(`data["order"]`, null for the plain one). They are read as they are and put into this run's order.
"""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from ..checkpoint.storage import Storage
from ..parallel.layout import rearranged, stacked_shapes
from ..parallel.state import TrainState
from .program import Program


def restore(program: Program, storage: Storage, step: int) -> tuple[TrainState, dict[str, Any]]:
    """The state saved at `step`, as `program` holds it, and what was saved with it. Raises as `Storage.restore`."""
    before = storage.data(step).get("order")
    if (before is None and program.order is None) or (before is not None and tuple(before) == program.order):
        return storage.restore(step, shapes=program.shapes, shardings=program.shardings)
    repeats = sum(repeats for _, repeats in program.config.model.segments)
    shapes = stacked_shapes(program.shapes, before=program.order, after=before, repeats=repeats)
    shardings = jax.tree.map(uncut, program.shapes, shapes, program.shardings)
    state, saved = storage.restore(step, shapes=shapes, shardings=shardings)
    with jax.set_mesh(program.mesh):
        move = jax.jit(
            lambda tree: rearranged(tree, before=before, after=program.order), out_shardings=program.shardings
        )
        return move(state), saved


def uncut(own: Any, saved: Any, sharding: NamedSharding) -> NamedSharding:
    """`sharding` for an array as it was saved; one whose first dimension is another is not cut along it."""
    if own.shape == saved.shape:
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec[1:]))
