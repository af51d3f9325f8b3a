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

    `local_devices`: devices of this process in a run of several processes; None: all of the mesh.
    """
    if mesh.platform == "auto":
        return
    jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda"}[mesh.platform])
    count = local_devices or mesh.device_count
    if mesh.platform != "cpu" or count is None or "host_platform_device_count" in xla_flags():
        return
    if jax.config.jax_num_cpu_devices != count:  # another program may have set it in this process
        jax.config.update("jax_num_cpu_devices", count)


def available_devices(mesh: MeshConfig) -> list[jax.Device]:
    """This run's devices. Raises UserError if the platform has none."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # which one depends on the installed plugins
        raise UserError(
            f"mesh.platform: {mesh.platform}, but JAX finds no such device on this machine ({first_line(error)}); "
            "install the extra `gpu`, run `meshwright doctor`, or use mesh.platform=cpu"
        ) from error


def xla_flags() -> str:
    """The user's XLA_FLAGS; a device count there takes precedence."""
    return os.environ.get("XLA_FLAGS", "")


def make_mesh(mesh: MeshConfig, *, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh over `devices` (default: this run's). Raises UserError if the axes do not multiply to their count."""
    devices = available_devices(mesh) if devices is None else list(devices)
    count = mesh.device_count or len(devices)
    if count > len(devices):
        raise UserError(
            f"mesh: its axes need {count} devices, but there are {len(devices)} ({devices[0].platform}); "
            "make the axes smaller, or simulate devices with mesh.platform=cpu"
        )
    try:
        sizes = mesh.resolve_sizes(count)
    except ValueError as error:
        raise UserError(str(error)) from None
    types = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    if count == jax.device_count():  # let the platform order devices by its links
        return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=types, devices=devices)
    grid = np.array(devices[:count]).reshape(tuple(sizes.values()))
    return jax.sharding.Mesh(grid, MESH_AXES, axis_types=types)
