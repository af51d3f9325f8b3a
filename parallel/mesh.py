"""The device mesh: seven named axes in a fixed order, all left to the partitioner (`AxisType.Auto`)."""

import os
from collections.abc import Sequence

import jax
import numpy as np

from ..configs.errors import UserError, first_line
from ..configs.names import MESH_AXES
from ..configs.sections.parallel import MeshConfig


def prepare_devices(mesh: MeshConfig, *, local_devices: int | None = None) -> None:
    """Choose the platform and, on a CPU, how many devices this process simulates. Call before any array exists.

    `local_devices` is this process's share in a multi-process run; null: all of them.
    """
    if mesh.platform == "auto":
        return
    jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda"}[mesh.platform])
    wanted = local_devices or mesh.device_count
    if mesh.platform != "cpu" or wanted is None or "host_platform_device_count" in xla_flags():
        return
    if jax.config.jax_num_cpu_devices != wanted:  # a second model may come to a process that has its devices
        jax.config.update("jax_num_cpu_devices", wanted)


def found_devices(mesh: MeshConfig) -> list[jax.Device]:
    """This run's devices. Raises UserError where the platform has none."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # which one depends on what is installed
        raise UserError(
            f"mesh.platform: {mesh.platform}: JAX finds no such device here ({first_line(error)}); "
            "install the extra `gpu`, look at `meshwright doctor`, or use mesh.platform=cpu"
        ) from error


def xla_flags() -> str:
    """What the user asked of XLA; a device count there is theirs to choose."""
    return os.environ.get("XLA_FLAGS", "")


def make_mesh(mesh: MeshConfig, *, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh over `devices` (default: this run's). Raises UserError where the axes do not multiply to their count."""
    devices = found_devices(mesh) if devices is None else list(devices)
    wanted = mesh.device_count or len(devices)
    if wanted > len(devices):
        raise UserError(
            f"mesh: {mesh.device_count} devices wanted, {len(devices)} {devices[0].platform} device(s) found; "
            "make the axes smaller, or simulate with mesh.platform=cpu"
        )
    try:
        sizes = mesh.resolve_sizes(wanted)
    except ValueError as error:
        raise UserError(str(error)) from None
    types = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    if wanted == jax.device_count():  # let the platform order devices by its links
        return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=types, devices=devices)
    grid = np.array(devices[:wanted]).reshape(tuple(sizes.values()))
    return jax.sharding.Mesh(grid, MESH_AXES, axis_types=types)
