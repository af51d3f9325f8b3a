"""Checkpoints of a state with one array, as it stands, on one device."""

import jax
import numpy as np

from meshwright.checkpoint.layout_conversion import Layout
from meshwright.parallel.state import TrainState

PLAIN = Layout("plain", lambda path, shape: [(path, ())])


def state_of(values, *, step=1):
    """A state on one device whose only parameter is `values`."""
    state = TrainState(np.int32(step), {"a": values}, {}, (), (), np.zeros(2, np.uint32))
    return jax.device_put(state, jax.devices()[0])


def small_state(step):
    return state_of(np.full(64, step, np.float32), step=step)


def restore(storage, step, like):
    """(state, data state) of a checkpoint; `like` has the shapes of the saved state."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), like)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return storage.restore(step, shapes=shapes, shardings=jax.tree.map(lambda _: sharding, shapes))
