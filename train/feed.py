"""From a host's batch to global arrays on the mesh."""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from ..configs.run import RunConfig
from ..parallel.rules import batch_shardings


def to_devices(batch: Mapping[str, np.ndarray], config: RunConfig, mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays [global_batch, sequence] from this process's rows of each field."""
    shape = (config.data.global_batch, config.data.sequence_length)
    return {
        field: jax.make_array_from_process_local_data(sharding, batch[field], shape)
        for field, sharding in batch_shardings(mesh).items()
    }
