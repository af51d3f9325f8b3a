"""The meshes that a run may continue on when hosts are lost, and the configuration on each of them.

The global batch, its order and its randomness are the same on every mesh. Another mesh changes how many devices share
the rows; the number of microbatches follows, so that a device computes no more rows at once than before. Under
`elastic.deterministic` one device computes a microbatch on every mesh, and their number does not change.
"""

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

from ..run_fields import RunFields

Axes = Mapping[str, int]  # axis -> size, none of them -1
Run = TypeVar("Run", bound=RunFields)


def with_mesh_axes(config: Run, axes: Axes, *, current_axes: Axes) -> Run:
    """`config` with mesh `axes` in place of `current_axes`; not validated."""
    mesh = config.mesh.model_copy(update={**axes, "devices": math.prod(axes.values())})
    count = config.microbatches
    if not config.elastic.deterministic:
        count = max(math.ceil(count * row_devices(current_axes) / row_devices(axes)), 1)
    return config.model_copy(update={"mesh": mesh, "microbatches": count})


def row_devices(axes: Axes) -> int:
    """How many devices share the rows of a replica's microbatch."""
    return axes["data"] * axes["fsdp"]


def check_elastic_meshes(config: RunFields, current_axes: Axes, check: Callable[[RunFields, Axes], None]) -> None:
    """Raise ValueError where the run cannot continue on an entry of `elastic.meshes`; `check` checks any mesh.

    The launcher checks entries with an axis of -1, because it knows the number of devices.
    """
    for number, entry in enumerate(config.elastic.meshes):
        if entry.replica != current_axes["replica"]:
            raise ValueError(
                f"elastic.meshes.{number}.replica: {entry.replica} differs from mesh.replica "
                f"({current_axes['replica']}), and each replica trains by itself; write the same number"
            )
        if entry.device_product is None:
            continue
        axes = entry.resolve_sizes(entry.device_product)
        try:
            check(with_mesh_axes(config, axes, current_axes=current_axes), axes)
        except ValueError as error:
            raise ValueError(f"elastic.meshes.{number}: {error}") from None


def check_deterministic(config: RunFields, axes: Axes) -> None:
    """Raise ValueError where gradients cannot be added in one order on a mesh of `axes`."""
    if refused_axes := [f"mesh.{axis}: {size}" for axis, size in axes.items() if axis != "data" and size > 1]:
        raise ValueError(
            f"{', '.join(refused_axes)}: elastic.deterministic allows sizes above 1 for mesh.data only; use mesh.data, "
            "or set elastic.deterministic to false (meshes then agree up to rounding)"
        )
    if config.recipe.compares_distributions:
        raise ValueError(
            f"recipe.name: {config.recipe.name} is not computed in a fixed order; set elastic.deterministic to false"
        )
    count, data = config.microbatches, axes["data"]
    per_device = count // data
    if count % data or (data > 1 and per_device & (per_device - 1)):
        fitting = [str(data * 2**power) for power in range(3)]
        raise ValueError(
            f"microbatches: {count} on mesh.data ({data}) devices, each of which computes a power of two of them under "
            f"elastic.deterministic; use {', '.join(fitting)}, ..."
        )
    islands = 1 if config.islands is None else config.islands.count
    if config.data.global_batch // islands % count:
        raise ValueError(
            f"data.global_batch: {config.data.global_batch} is not divisible by microbatches ({count})"
            f"{f' on each of {islands} islands' if islands > 1 else ''}, and elastic.deterministic needs microbatches "
            "of one shape; use a multiple"
        )
