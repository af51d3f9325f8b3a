"""`meshwright schedule`: make a pipeline schedule, price it, print it, draw it, write it down. Imports no JAX.

wanted = Wanted("v-half", stages=4, microbatches=16, vocabulary=2)
examine(wanted) -> Examination      # the table, and its timeline at the given costs
facts(examination) -> dict          # what --json prints
render(examination)                 # what is printed otherwise
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table as Grid
from rich.text import Text

from ...configs.errors import UserError
from ...parallel.pipeline.tables.ascii import lines
from ...parallel.pipeline.tables.costs import Costs, read_costs
from ...parallel.pipeline.tables.csv_io import read_csv, write_csv
from ...parallel.pipeline.tables.fused_backward import fused
from ...parallel.pipeline.tables.schedules.registry import SCHEDULES, make
from ...parallel.pipeline.tables.search import best, candidates
from ...parallel.pipeline.tables.simulator import Timeline, simulate
from ...parallel.pipeline.tables.table import Table


@dataclass(frozen=True)
class Wanted:
    """What was asked for on the command line."""

    name: str  # of the registry, `best`, or the path of a CSV
    stages: int | None = None  # devices of the pipeline; a CSV knows its own
    microbatches: int | None = None
    chunks: int | None = None
    vocabulary: int = 0
    memory_limit: float | None = None
    backward: str = "split"  # or fused
    costs: Path | None = None
    cores: int | None = None


@dataclass(frozen=True, eq=False)
class Examination:
    """A schedule and what it takes; `others` are the schedules that were compared, for `best`."""

    table: Table
    timeline: Timeline
    others: Sequence[tuple[Table, Timeline]] = ()


def examine(wanted: Wanted) -> Examination:
    """Make and simulate. Raises UserError for what cannot be."""
    costs = read_costs(wanted.costs) if wanted.costs is not None else Costs()
    if wanted.cores is not None and wanted.cores < 1:
        raise UserError(f"--cores {wanted.cores}: at least 1 core computes")
    if wanted.backward not in ("split", "fused"):
        raise UserError.no_match("--backward", [wanted.backward], known=["split", "fused"])
    if wanted.name == "best":
        return _best(wanted, costs)
    table = _table(wanted)
    if wanted.backward == "fused":
        table = fused(table)
    return Examination(table, simulate(table, costs, cores=wanted.cores))


def _table(wanted: Wanted) -> Table:
    if wanted.name.endswith(".csv"):
        path = Path(wanted.name)
        own = read_csv(path)
        return make("file", path=path, devices=wanted.stages or own.devices,
                    microbatches=wanted.microbatches or own.microbatches, chunks=wanted.chunks,
                    vocabulary=wanted.vocabulary or own.algorithm, memory_limit=wanted.memory_limit)  # fmt: skip
    if wanted.name not in SCHEDULES or wanted.name == "file":
        known = sorted(SCHEDULES.keys() - {"file"})
        raise UserError.no_match("schedule", [wanted.name], known=[*known, "best", "PATH.csv"])
    stages, microbatches = _size(wanted)
    return make(wanted.name, devices=stages, microbatches=microbatches, chunks=wanted.chunks,
                vocabulary=wanted.vocabulary, memory_limit=wanted.memory_limit)  # fmt: skip


def _size(wanted: Wanted) -> tuple[int, int]:
    for option in ("stages", "microbatches"):
        if getattr(wanted, option) is None:
            raise UserError(f"--{option}: say how many, e.g. --stages 4 --microbatches 16")
    return wanted.stages, wanted.microbatches


def _best(wanted: Wanted, costs: Costs) -> Examination:
    for option, flag, nothing in (("chunks", "--chunks", None), ("backward", "--backward", "split")):
        if getattr(wanted, option) != nothing:
            raise UserError(f"{flag} {getattr(wanted, option)}: best compares schedules as they are; leave it out")
    stages, microbatches = _size(wanted)
    asked = {"devices": stages, "microbatches": microbatches, "costs": costs, "memory_limit": wanted.memory_limit,
             "vocabulary": wanted.vocabulary}  # fmt: skip
    chosen = best(**asked).table
    others = [(one.table, simulate(one.table, costs, cores=wanted.cores)) for one in candidates(**asked)]
    others.sort(key=lambda one: one[1].makespan)
    return Examination(chosen, simulate(chosen, costs, cores=wanted.cores), others)


def keep(examination: Examination, *, drawing: Path | None, csv: Path | None, costs: Path | None) -> None:
    """Write what was asked for; on the clock where costs were given, in ticks otherwise."""
    if csv is not None:
        write_csv(examination.table, csv)
    if drawing is not None:
        from ...parallel.pipeline.tables.svg import draw  # matplotlib takes its time

        timeline = None if costs is None else examination.timeline
        draw(examination.table, drawing, timeline=timeline, title=headline(examination))


def check_targets(*, drawing: Path | None, csv: Path | None) -> None:
    """Raises UserError for a file that is there already, or that cannot be: before anything is computed or written."""
    if drawing is not None:
        from ...parallel.pipeline.tables.svg import check_suffix

        check_suffix(drawing)
    for target in (drawing, csv):
        if target is not None and target.exists():
            raise UserError(f"{target} exists; choose another name, nothing is overwritten")
        if target is not None and not target.parent.is_dir():
            raise UserError(f"{target}: {target.parent} is no directory; make it first")


def headline(examination: Examination) -> str:
    """The schedule in a line."""
    table, timeline = examination.table, examination.timeline
    vocabulary = f", vocabulary passes by Algorithm {table.algorithm}" if table.algorithm else ""
    return (f"{table.name}{vocabulary}: {table.devices} devices, {table.microbatches} microbatches, "
            f"{table.ticks} ticks, bubble {timeline.bubble:.1%}, at most {timeline.in_flight.max():g} "
            f"microbatches held")  # fmt: skip


def facts(examination: Examination) -> dict:
    """Everything there is to say, as JSON takes it."""
    table, timeline = examination.table, examination.timeline
    told = {
        "schedule": table.name, "devices": table.devices, "chunks": table.chunks, "microbatches": table.microbatches,
        "vocabulary": table.algorithm, "ticks": table.ticks, **_numbers(timeline),
        "in_flight": timeline.in_flight.tolist(), "slots": table.slots.tolist(), "placement": table.placement.tolist(),
    }  # fmt: skip
    compared = [{"schedule": one.name, **_numbers(clock), "in_flight": clock.in_flight.tolist()}
                for one, clock in examination.others]  # fmt: skip
    return {**told, "compared": compared} if compared else told


def _numbers(timeline: Timeline) -> dict[str, float]:
    return {
        "makespan": timeline.makespan, "bubble": timeline.bubble, "lockstep": timeline.lockstep,
        "lockstep_bubble": timeline.lockstep_bubble, "bubble_between_steps": timeline.bubble_between_steps,
    }  # fmt: skip


def render(examination: Examination, *, width: int, limit: float | None = None) -> RenderableType:
    """For people, in lines of `width` characters: a schedule's ops and numbers, and one line for each it was compared
    with, those over the `limit` of microbatches marked."""
    table, timeline = examination.table, examination.timeline
    grid = Grid(box=None, show_header=False, pad_edge=False)
    grid.add_column(style="dim")
    grid.add_column()
    grid.add_row("makespan", f"{timeline.makespan:g}, devices on their own; bubble {timeline.bubble:.1%}")
    grid.add_row("lock-step", f"{timeline.lockstep:g}, one program; bubble {timeline.lockstep_bubble:.1%}")
    grid.add_row("between steps", f"bubble {timeline.bubble_between_steps:.1%} if the next step follows at once")
    grid.add_row("held", f"{_list(timeline.in_flight)} microbatches on each device")
    grid.add_row("slots", f"{_list(table.slots)} activations of a stage")
    grid.add_row("stages", " | ".join(" ".join(map(str, row)) for row in table.placement.tolist()))
    ops = Text("\n".join(lines(table, width=width)), no_wrap=True)
    parts: list[RenderableType] = [Text(headline(examination), style="bold"), ops, grid]
    if examination.others:
        parts.append(_comparison(examination, limit))
    return Group(*parts)


def _comparison(examination: Examination, limit: float | None) -> Grid:
    grid = Grid("schedule", "makespan", "bubble", "lock-step", "held at most", pad_edge=False)
    for table, timeline in examination.others:
        chosen = "bold" if table.name == examination.table.name else ""
        held = timeline.in_flight.max()
        over = f", over {limit:g}" if limit is not None and held > limit else ""
        grid.add_row(table.name, f"{timeline.makespan:g}", f"{timeline.bubble:.1%}", f"{timeline.lockstep:g}",
                     f"{held:g}{over}", style=chosen)  # fmt: skip
    return grid


def _list(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)
