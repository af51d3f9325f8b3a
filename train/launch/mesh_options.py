"""On which meshes a run can compute, with how many processes each, and which slots fill one. JAX-free.

A *slot* is a place that holds one process: a host, a node of an allocation, on one machine just a number. The run's own
mesh comes first, then `elastic.meshes` in their order.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from ...configs.checks.elastic_meshes import Axes, with_mesh_axes
from ...configs.checks.mesh_fit import check_mesh_fit
from ...configs.errors import UserError
from ...configs.run import RunConfig
from ..engine.pipeline.pipeline_plan import check_pipeline


@dataclass(frozen=True)
class MeshOption:
    """A mesh that the run can compute on, and the number of processes that make it."""

    processes: int
    mesh: str = "its own mesh"  # as people read it, e.g. `data 2 x tensor 2`
    overrides: tuple[str, ...] = ()  # `key=value` that the launcher adds to the trainers' command


@dataclass(frozen=True)
class Assignment:
    """A mesh option and the slots that fill it: process n of the epoch is in slot `slots[n]`."""

    option: MeshOption
    slots: tuple[int, ...]


def mesh_options(
    config: RunConfig, *, processes: int, devices_per_process: int | None = None
) -> tuple[MeshOption, ...]:
    """The mesh options of a run that starts in `processes` processes, the preferred first.

    Raises UserError where an entry of `elastic.meshes` does not divide into such processes.
    """
    if not config.elastic.meshes:
        return (MeshOption(processes),)
    devices, run_axes = process_devices(config, processes=processes, devices_per_process=devices_per_process)
    options = [MeshOption(processes, describe_axes(run_axes))]
    for index, entry in enumerate(config.elastic.meshes):
        sizes = (
            [entry.device_product] if entry.device_product else [devices * count for count in range(processes, 0, -1)]
        )
        sizes = [size for size in sizes if size % devices == 0 and size // devices <= processes]
        fitting = list(fitting_options(config, index, sizes, run_axes=run_axes, devices_per_process=devices))
        if not fitting:
            raise UserError(
                f"elastic.meshes.{index}: no number of processes with {devices} devices each, up to {processes}, fits "
                f"{describe_axes(entry.sizes)}, data.global_batch ({config.data.global_batch}) and microbatches "
                f"({config.microbatches}); change the entry, or launch.processes"
            )
        options += [option for option in fitting if option.overrides]
    return tuple(options)


def process_devices(config: RunConfig, *, processes: int, devices_per_process: int | None) -> tuple[int, Axes]:
    """Devices of each process, and the sizes of the run's own axes. Raises UserError where they cannot be known."""
    count = config.mesh.device_count if devices_per_process is None else devices_per_process * processes
    if count is None:
        raise UserError(
            "elastic.meshes: how many devices a process has cannot be told from a mesh with an axis of -1; "
            "set mesh.devices or launch.devices_per_process"
        )
    try:
        return count // processes, config.mesh.resolve_sizes(count)
    except ValueError as error:
        raise UserError(str(error)) from None


def fitting_options(
    config: RunConfig, index: int, sizes: Sequence[int], *, run_axes: Axes, devices_per_process: int
) -> Iterator[MeshOption]:
    """Yield the options that entry `index` of `elastic.meshes` makes of each size (devices) that it fits."""
    entry = config.elastic.meshes[index]
    for size in sizes:
        try:
            axes = entry.resolve_sizes(size)
            changed = with_mesh_axes(config, axes, current_axes=run_axes)
            check_mesh_fit(changed, axes)
            check_pipeline(changed)
        except ValueError:
            continue
        except UserError:
            if entry.device_product:
                raise
            continue
        axis_sizes = ", ".join(f"{axis}: {size}" for axis, size in axes.items())
        overrides = (f"mesh={{{axis_sizes}, devices: {size}}}", f"microbatches={changed.microbatches}")
        yield MeshOption(size // devices_per_process, describe_axes(axes), () if axes == run_axes else overrides)


def describe_axes(axes: Axes) -> str:
    """Axes as people read them, e.g. `data 2 x tensor 2`."""
    return " x ".join(f"{axis} {size}" for axis, size in axes.items() if size != 1) or "one device"


def choose_assignment(
    options: Sequence[MeshOption], slots: Collection[int], *, unreliable: Collection[int] = frozenset()
) -> Assignment | None:
    """The first option that `slots` fill, and the slots; None where none does.

    `unreliable` slots are used where no option can be filled without them.
    """
    for usable in (sorted(set(slots) - set(unreliable)), sorted(slots)):
        for option in options:
            if option.processes <= len(usable):
                return Assignment(option, tuple(usable[: option.processes]))
    return None
