"""The schedule with the shortest step that fits in memory. NumPy only."""

from collections.abc import Iterator
from dataclasses import dataclass

from ....configs.errors import UserError
from .costs import Costs
from .schedules.registry import SCHEDULES, make
from .simulator import Timeline, simulate
from .table import Table


@dataclass(frozen=True, eq=False)
class Candidate:
    """A table and what it takes."""

    table: Table
    timeline: Timeline


def candidates(
    *, devices: int, microbatches: int, costs: Costs | None = None, memory_limit: float | None = None,
    vocabulary: int = 0, chunks: int = 2,
) -> Iterator[Candidate]:  # fmt: skip
    """Every training schedule that can be made for these numbers; `chunks` where a schedule takes any number."""
    for name, family in SCHEDULES.items():
        if not family.trains or "path" in family.options or vocabulary not in family.vocabulary or name == "interlaced":
            continue
        if name == "interleaved" and microbatches % devices:
            continue
        if "memory_limit" in family.options and memory_limit is not None and memory_limit < 1:
            continue
        limit = memory_limit if "memory_limit" in family.options else None
        number = chunks if family.chunks[1] is None else None
        table = make(name, devices=devices, microbatches=microbatches, chunks=number, vocabulary=vocabulary,
                     memory_limit=limit)  # fmt: skip
        yield Candidate(table, simulate(table, costs))


def best(
    *, devices: int, microbatches: int, costs: Costs | None = None, memory_limit: float | None = None,
    vocabulary: int = 0,
) -> Candidate:  # fmt: skip
    """The candidate of the shortest asynchronous makespan that holds at most `memory_limit` microbatches on any device.

    Of equal ones the one that holds least. Raises UserError, with the smallest peak there is, where none fits.
    """
    found = list(candidates(devices=devices, microbatches=microbatches, costs=costs, memory_limit=memory_limit,
                            vocabulary=vocabulary))  # fmt: skip
    fitting = [one for one in found if memory_limit is None or one.timeline.in_flight.max() <= memory_limit]
    if not fitting:
        least = min(found, key=lambda one: one.timeline.in_flight.max())
        raise UserError(f"--memory-limit: no schedule of {devices} stages holds at most {memory_limit} microbatches; "
                        f"{least.table.name} holds {least.timeline.in_flight.max():g}")  # fmt: skip
    return min(fitting, key=lambda one: (round(one.timeline.makespan, 9), one.timeline.in_flight.max()))
