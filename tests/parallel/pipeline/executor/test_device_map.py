"""The engine's map under `vmap`: every replica's own arrays, and no nested map that would come before its parent."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from meshwright.configs.sections.parallel import MeshConfig
from meshwright.parallel.mesh import make_mesh
from meshwright.parallel.pipeline.executor.device_map import map_over_devices

REPLICAS, PIPE = 4, 2


def scaled_sum(rows, scale, absent):
    assert absent is None
    return jax.lax.psum(rows.sum(0), "pipe") * scale, rows * scale


def lifted(mesh):
    cut, whole = PartitionSpec("pipe"), PartitionSpec()
    sums = map_over_devices(scaled_sum, mesh=mesh, in_specs=(cut, whole, whole), out_specs=(whole, cut))
    return jax.jit(jax.vmap(sums, in_axes=(0, None, None)))


@pytest.mark.parametrize("replica", [1, REPLICAS])
def test_each_replica_has_its_own_rows_and_what_is_not_mapped_is_everybodys(replica):
    mesh = make_mesh(MeshConfig(platform="cpu", replica=replica, pipe=PIPE))
    rows = np.arange(REPLICAS * PIPE * 3.0, dtype=np.float32).reshape(REPLICAS, PIPE, 3)
    scale = np.float32([1, 2, 3])
    total, each = lifted(mesh)(rows, scale, None)
    np.testing.assert_array_equal(total, rows.sum(1) * scale)
    np.testing.assert_array_equal(each, rows * scale)


def test_the_lifted_map_takes_the_replicas_axis_itself():
    """A map inside of it that took the axis instead would abort the process on XLA of JAX 0.12."""
    mesh = make_mesh(MeshConfig(platform="cpu", replica=REPLICAS, pipe=PIPE))
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((REPLICAS, PIPE, 3), (3,))]
    text = lifted(mesh).lower(*shapes, None).as_text()
    assert re.findall(r"manual_axes=\{([^}]*)\}", text) == ['"replica", "pipe", "data", "fsdp"']
