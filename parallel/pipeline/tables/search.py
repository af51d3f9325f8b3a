"""The schedule with the shortest step that fits in memory. NumPy only."""

from collections.abc import Iterator
from dataclasses import dataclass

from ....configs.errors import UserError
from .costs import Costs
from .schedules.registry import SCHEDULES, make_table
from .simulator import Timeline, simulate
from .table import Table


@dataclass(frozen=True, eq=False)
class Candidate:
    """A table and its timeline."""

    table: Table
    timeline: Timeline


def candidates(
    *, devices: int, microbatches: int, costs: Costs | None = None, memory_limit: float | None = None,
    vocabulary: int = 0, chunks: int = 2,
) -> Iterator[Candidate]:  # fmt: skip
    """Every training schedule that exists for these numbers; `chunks` where a schedule takes any number of them."""
    for name, family in SCHEDULES.items():
        if not family.trains or "path" in family.options or vocabulary not in family.vocabulary or name == "interlaced":
            continue
        if name == "interleaved" and microbatches % devices:
            continue
        limit = memory_limit if "memory_limit" in family.options else None
        if limit is not None and limit < 1:
            continue
        number = chunks if family.chunks[1] is None else None
        table = make_table(name, devices=devices, microbatches=microbatches, chunks=number, vocabulary=vocabulary,
                           memory_limit=limit)  # fmt: skip
        yield Candidate(table, simulate(table, costs))


def fastest_schedule(
    *, devices: int, microbatches: int, costs: Costs | None = None, memory_limit: float | None = None,
    vocabulary: int = 0,
) -> Candidate:  # fmt: skip
    """The candidate of the shortest asynchronous makespan that holds at most `memory_limit` microbatches on any device.

    Of equally fast ones the one that holds least. Raises UserError, with the smallest peak there is, if none fits.
    """
    options = list(candidates(devices=devices, microbatches=microbatches, costs=costs, memory_limit=memory_limit,
                              vocabulary=vocabulary))  # fmt: skip
    fitting = [option for option in options if memory_limit is None or option.timeline.in_flight.max() <= memory_limit]
    if not fitting:
        smallest = min(options, key=lambda option: option.timeline.in_flight.max())
        raise UserError(f"--memory-limit: {memory_limit} microbatches, but every schedule of {devices} stages holds "
                        f"more; raise the limit to {smallest.timeline.in_flight.max():g}, which "
                        f"{smallest.table.name} needs")  # fmt: skip
    return min(fitting, key=lambda option: (round(option.timeline.makespan, 9), option.timeline.in_flight.max()))
