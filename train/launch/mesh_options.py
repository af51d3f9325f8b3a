"""In which formations a run can compute: how many processes, on which mesh. And which slots fill one. JAX-free.

A *slot* is a place that holds one process: a host, a node of an allocation, on one machine just a number. The run's own
mesh comes first, then `elastic.meshes` in their order; a formation is what the launcher adds to the trainers' command.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from ...configs.checks.elastic_meshes import Axes, on_axes
from ...configs.checks.mesh_fit import check_fits
from ...configs.errors import UserError
from ...configs.run import RunConfig
from ..engine.pipeline.pipeline_plan import check_staging


@dataclass(frozen=True)
class Formation:
    """So many processes on one mesh."""

    processes: int
    mesh: str = "its own mesh"  # in words, for people
    words: tuple[str, ...] = ()  # `key=value` after the trainers' command


@dataclass(frozen=True)
class Team:
    """A formation and the slots that fill it: process n of the epoch is in slot `slots[n]`."""

    formation: Formation
    slots: tuple[int, ...]


def formations(config: RunConfig, *, processes: int, devices_per_process: int | None = None) -> tuple[Formation, ...]:
    """The formations of a run that starts in `processes` processes, the preferred first.

    Raises UserError where an entry of `elastic.meshes` does not divide into such processes.
    """
    if not config.elastic.meshes:
        return (Formation(processes),)
    each, own = shares(config, processes=processes, devices_per_process=devices_per_process)
    found = [Formation(processes, spelt(own))]
    for number, entry in enumerate(config.elastic.meshes):
        sizes = [entry.product] if entry.product else [each * count for count in range(processes, 0, -1)]
        fitting = list(fitted(config, number, sizes, own=own, each=each, processes=processes))
        if not fitting:
            raise UserError(
                f"elastic.meshes.{number}: no number of processes with {each} devices each, up to {processes}, fits "
                f"{spelt(entry.sizes)}, data.global_batch ({config.data.global_batch}) and microbatches "
                f"({config.microbatches})"
            )
        found += [formation for formation in fitting if formation.words != ()]
    return tuple(found)


def shares(config: RunConfig, *, processes: int, devices_per_process: int | None) -> tuple[int, Axes]:
    """Devices of each process, and the sizes of the run's own axes. Raises UserError where they cannot be known."""
    count = config.mesh.count if devices_per_process is None else devices_per_process * processes
    if count is None:
        raise UserError(
            "elastic.meshes: how many devices a process has cannot be told from a mesh with an axis of -1; "
            "set mesh.devices or launch.devices_per_process"
        )
    try:
        return count // processes, config.mesh.resolved(count)
    except ValueError as error:
        raise UserError(str(error)) from None


def fitted(
    config: RunConfig, number: int, sizes: Sequence[int], *, own: Axes, each: int, processes: int
) -> Iterator[Formation]:
    """The formations that entry `number` of `elastic.meshes` makes of `sizes` devices, where it fits."""
    entry = config.elastic.meshes[number]
    for size in sizes:
        if size % each or size // each > processes:
            continue
        try:
            axes = entry.resolved(size)
            changed = on_axes(config, axes, own=own)
            check_fits(changed, axes)
            check_staging(changed)
        except ValueError:
            continue
        except UserError:
            if entry.product:
                raise
            continue
        sizes_of = ", ".join(f"{axis}: {size}" for axis, size in axes.items())
        words = (f"mesh={{{sizes_of}, devices: {size}}}", f"microbatches={changed.microbatches}")
        yield Formation(size // each, spelt(axes), () if axes == own else words)


def spelt(axes: Axes) -> str:
    """Axes in words, e.g. `data 2 x tensor 2`."""
    return " x ".join(f"{axis} {size}" for axis, size in axes.items() if size != 1) or "one device"


def team(
    candidates: Sequence[Formation], slots: Collection[int], *, struck: Collection[int] = frozenset()
) -> Team | None:
    """The first formation that `slots` fill, and the slots; None where none does.

    Slots that are `struck` out are used where there is no formation without them.
    """
    for usable in (sorted(set(slots) - set(struck)), sorted(slots)):
        for formation in candidates:
            if formation.processes <= len(usable):
                return Team(formation, tuple(usable[: formation.processes]))
    return None
