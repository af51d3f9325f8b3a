"""The meshes a run may go on with when hosts are lost, and what each makes of the configuration.

The global batch, its order and its randomness are the run's, whatever mesh computes it. What another mesh changes is
how many devices share the rows; the number of microbatches follows, so that a device computes no more rows at once than
before. Under `elastic.deterministic` a microbatch is one device's on every mesh, and their number is part of the run.
"""

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

from ..run_fields import RunFields

Axes = Mapping[str, int]  # axis -> size, none of them -1
Run = TypeVar("Run", bound=RunFields)


def with_mesh_axes(config: Run, axes: Axes, *, current_axes: Axes) -> Run:
    """`config` on a mesh of `axes` in place of its `own`, unchecked."""
    mesh = config.mesh.model_copy(update={**axes, "devices": math.prod(axes.values())})
    count = config.microbatches
    if not config.elastic.deterministic:
        count = max(math.ceil(count * row_devices(current_axes) / row_devices(axes)), 1)
    return config.model_copy(update={"mesh": mesh, "microbatches": count})


def row_devices(axes: Axes) -> int:
    """Devices that share the rows of a replica's microbatch."""
    return axes["data"] * axes["fsdp"]


def check_elastic_meshes(config: RunFields, current_axes: Axes, check: Callable[[RunFields, Axes], None]) -> None:
    """Raise ValueError where an entry of `elastic.meshes` cannot go on with the run; `check` is that of any mesh.

    An entry with an axis of -1 is left to the launcher, which knows how many devices there are.
    """
    for number, entry in enumerate(config.elastic.meshes):
        if entry.replica != current_axes["replica"]:
            raise ValueError(
                f"elastic.meshes.{number}: replica {entry.replica} would be another run than mesh.replica "
                f"({current_axes['replica']}): each replica trains by itself; write the same number"
            )
        if entry.device_product is None:
            continue
        axes = entry.resolve_sizes(entry.device_product)
        try:
            check(with_mesh_axes(config, axes, current_axes=current_axes), axes)
        except ValueError as error:
            raise ValueError(f"elastic.meshes.{number}: {error}") from None


def check_deterministic(config: RunFields, axes: Axes) -> None:
    """Raise ValueError where `elastic.deterministic` cannot keep its promise on a mesh of `axes`."""
    if others := [f"mesh.{axis}: {size}" for axis, size in axes.items() if axis != "data" and size > 1]:
        raise ValueError(
            f"{', '.join(others)}: elastic.deterministic adds gradients in one order where `data` is the only axis "
            "above 1; set it to false (meshes then agree to rounding), or use data alone"
        )
    if config.recipe.compares_distributions:
        raise ValueError(
            f"recipe.name: {config.recipe.name} is not computed in a fixed order; set elastic.deterministic to false"
        )
    count, data = config.microbatches, axes["data"]
    own = count // data
    if count % data or (data > 1 and own & (own - 1)):
        fitting = [str(data * 2**power) for power in range(3)]
        raise ValueError(
            f"microbatches: {count} cannot be added in one order by mesh.data ({data}) devices: under "
            f"elastic.deterministic each computes a power of two of them; use {', '.join(fitting)}, ..."
        )
    islands = 1 if config.islands is None else config.islands.count
    if config.data.global_batch // islands % count:
        raise ValueError(
            f"data.global_batch: {config.data.global_batch} is not divisible by microbatches ({count})"
            f"{f' on each of {islands} islands' if islands > 1 else ''}; under "
            "elastic.deterministic each is computed by one device, all of one shape"
        )
