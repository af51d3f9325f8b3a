"""The device mesh: seven named axes in a fixed order, all left to the partitioner (`AxisType.Auto`)."""

import logging
import math
import os
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

from ..configs.errors import UserError, first_line
from ..configs.names import MESH_AXES
from ..configs.sections.parallel import MeshConfig

logger = logging.getLogger(__name__)

JAX_PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}  # mesh.platform -> JAX's name
SLICE_AXES = ("replica", "data")  # may cross slices, whose network is slow: they communicate once a step, or less


def prepare_devices(mesh: MeshConfig, *, local_devices: int | None = None) -> None:
    """Choose the platform and, on a CPU, how many devices this process simulates. Call before any array exists.

    `local_devices`: devices of this process in a run of several processes; None: all of the mesh.
    """
    if mesh.platform == "auto":
        return
    jax.config.update("jax_platforms", JAX_PLATFORMS[mesh.platform])
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
            f"install the extra `{mesh.platform}`, run `meshwright doctor`, or use mesh.platform=cpu"
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
    return jax.sharding.Mesh(order_devices(devices[:count], sizes), MESH_AXES, axis_types=types)


def order_devices(devices: Sequence[jax.Device], sizes: Mapping[str, int]) -> np.ndarray:
    """The devices as an array of the shape `sizes`, so that neighbours along an axis are close by the platform's links.

    Slices, which only a network links, lie along `replica`, then `data`. Raises UserError if these do not fit them. A
    part of a slice that is no box keeps the order of its devices, and a warning says so.
    """
    shape = tuple(sizes.values())
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        across = slice_sizes(slices, sizes)
        within = tuple(size // across.get(axis, 1) for axis, size in sizes.items())
        return mesh_utils.create_hybrid_device_mesh(
            within, tuple(across.get(axis, 1) for axis in sizes), devices=devices, allow_split_physical_axes=True
        )
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (NotImplementedError, AssertionError):  # JAX's, for devices that fill no box of the torus
        logger.warning(
            "mesh: these %d devices fill no box of their slice, so neighbours may be far apart; use all of it",
            len(devices),
        )
        return np.array(devices).reshape(shape)


def slice_sizes(slices: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Axis -> number of slices along it. Raises UserError if `replica` and `data` cannot hold all.

    >>> slice_sizes(4, {"replica": 2, "data": 6})
    {'replica': 2, 'data': 2}
    """
    across, left = {}, slices
    for axis in SLICE_AXES:
        across[axis] = math.gcd(left, sizes[axis])
        left //= across[axis]
    if left > 1:
        written = " x ".join(f"{axis} {sizes[axis]}" for axis in SLICE_AXES)
        raise UserError(
            f"mesh: {slices} slices, which only a network links, lie along replica and data, but {written} does not "
            f"divide into {slices}; set mesh.data to a multiple of {slices}"
        )
    return across
