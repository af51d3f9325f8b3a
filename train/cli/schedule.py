"""`meshwright schedule`: make a pipeline schedule, price it, print it, draw it, write it to a file. Imports no JAX.

request = ScheduleRequest("v-half", stages=4, microbatches=16, vocabulary=2)
make_schedule(request) -> ScheduleResult    # the table, and its timeline at the given costs
to_json(result) -> dict                     # what --json prints
render(result)                              # what is printed otherwise
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
from ...parallel.pipeline.tables.fused_backward import fuse_backward
from ...parallel.pipeline.tables.schedules.registry import SCHEDULES, make_table
from ...parallel.pipeline.tables.search import candidates, fastest_schedule
from ...parallel.pipeline.tables.simulator import Timeline, simulate
from ...parallel.pipeline.tables.table import Table


@dataclass(frozen=True)
class ScheduleRequest:
    """The arguments of the command line."""

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
class ScheduleResult:
    """A schedule and its timeline; for `best` also the schedules that were compared, the fastest first."""

    table: Table
    timeline: Timeline
    compared: Sequence[tuple[Table, Timeline]] = ()


def make_schedule(request: ScheduleRequest) -> ScheduleResult:
    """Make and simulate a schedule. Raises UserError where an argument is wrong or fits no schedule."""
    costs = read_costs(request.costs) if request.costs is not None else Costs()
    if request.cores is not None and request.cores < 1:
        raise UserError(f"--cores {request.cores}: at least 1 core computes")
    if request.backward not in ("split", "fused"):
        raise UserError.no_match("--backward", [request.backward], candidates=["split", "fused"])
    if request.name == "best":
        return _best(request, costs)
    table = _table(request)
    if request.backward == "fused":
        table = fuse_backward(table)
    return ScheduleResult(table, simulate(table, costs, cores=request.cores))


def _table(request: ScheduleRequest) -> Table:
    options = {"chunks": request.chunks, "memory_limit": request.memory_limit, "vocabulary": request.vocabulary}
    if request.name.endswith(".csv"):
        path = Path(request.name)
        table = read_csv(path)
        stages, microbatches = request.stages or table.devices, request.microbatches or table.microbatches
        options |= {"path": path, "vocabulary": request.vocabulary or table.algorithm}
        return make_table("file", devices=stages, microbatches=microbatches, **options)
    if request.name not in SCHEDULES or request.name == "file":
        known = sorted(SCHEDULES.keys() - {"file"})
        raise UserError.no_match("schedule", [request.name], candidates=[*known, "best", "PATH.csv"])
    _check_size(request)
    return make_table(request.name, devices=request.stages, microbatches=request.microbatches, **options)


def _check_size(request: ScheduleRequest) -> None:
    for option in ("stages", "microbatches"):
        if getattr(request, option) is None:
            raise UserError(f"--{option}: say how many, e.g. --stages 4 --microbatches 16")


def _best(request: ScheduleRequest, costs: Costs) -> ScheduleResult:
    for option, default in (("chunks", None), ("backward", "split")):
        if (value := getattr(request, option)) != default:
            raise UserError(f"--{option} {value}: best compares schedules as they are; leave it out")
    _check_size(request)
    options = {
        "devices": request.stages, "microbatches": request.microbatches, "costs": costs,
        "memory_limit": request.memory_limit, "vocabulary": request.vocabulary,
    }  # fmt: skip
    fastest = fastest_schedule(**options).table
    tables = [candidate.table for candidate in candidates(**options)]
    compared = [(table, simulate(table, costs, cores=request.cores)) for table in tables]
    compared.sort(key=lambda pair: pair[1].makespan)
    return ScheduleResult(fastest, simulate(fastest, costs, cores=request.cores), compared)


def write_files(result: ScheduleResult, *, drawing: Path | None, csv: Path | None, costs: Path | None) -> None:
    """Write the files that were asked for. A drawing's axis is time where costs were given, else ticks."""
    if csv is not None:
        write_csv(result.table, csv)
    if drawing is not None:
        from ...parallel.pipeline.tables.svg import draw  # matplotlib takes its time

        timeline = None if costs is None else result.timeline
        draw(result.table, drawing, timeline=timeline, title=headline(result))


def check_targets(*, drawing: Path | None, csv: Path | None) -> None:
    """Raise UserError for a file that exists or cannot be written, before anything is computed."""
    if drawing is not None:
        from ...parallel.pipeline.tables.svg import check_suffix

        check_suffix(drawing)
    for target in (drawing, csv):
        if target is not None and target.exists():
            raise UserError(f"{target} exists; choose another name, nothing is overwritten")
        if target is not None and not target.parent.is_dir():
            raise UserError(f"{target}: {target.parent} is no directory; make it first")


def headline(result: ScheduleResult) -> str:
    """The schedule and its main numbers, in one line."""
    table, timeline = result.table, result.timeline
    vocabulary = f", vocabulary passes by Algorithm {table.algorithm}" if table.algorithm else ""
    return (f"{table.name}{vocabulary}: {table.devices} devices, {table.microbatches} microbatches, "
            f"{table.ticks} ticks, bubble {timeline.bubble:.1%}, at most {timeline.in_flight.max():g} "
            f"microbatches held")  # fmt: skip


def to_json(result: ScheduleResult) -> dict:
    """The schedule and all numbers of its timeline, ready for JSON."""
    table, timeline = result.table, result.timeline
    content = {
        "schedule": table.name, "devices": table.devices, "chunks": table.chunks, "microbatches": table.microbatches,
        "vocabulary": table.algorithm, "ticks": table.ticks, **_timeline_numbers(timeline),
        "in_flight": timeline.in_flight.tolist(), "slots": table.slots.tolist(), "placement": table.placement.tolist(),
    }  # fmt: skip
    compared = [
        {"schedule": other.name, **_timeline_numbers(timeline), "in_flight": timeline.in_flight.tolist()}
        for other, timeline in result.compared
    ]
    return {**content, "compared": compared} if compared else content


def _timeline_numbers(timeline: Timeline) -> dict[str, float]:
    return {
        "makespan": timeline.makespan, "bubble": timeline.bubble, "lockstep": timeline.lockstep,
        "lockstep_bubble": timeline.lockstep_bubble, "bubble_between_steps": timeline.bubble_between_steps,
    }  # fmt: skip


def render(result: ScheduleResult, *, width: int, limit: float | None = None) -> RenderableType:
    """Lines of `width` characters for people: a schedule's ops and numbers, and a row for each it was compared with.

    Those that hold more microbatches than `limit` are marked.
    """
    table, timeline = result.table, result.timeline
    grid = Grid(box=None, show_header=False, pad_edge=False)
    grid.add_column(style="dim")
    grid.add_column()
    grid.add_row("makespan", f"{timeline.makespan:g}, devices on their own; bubble {timeline.bubble:.1%}")
    grid.add_row("lock-step", f"{timeline.lockstep:g}, one program; bubble {timeline.lockstep_bubble:.1%}")
    grid.add_row("between steps", f"bubble {timeline.bubble_between_steps:.1%} if the next step follows at once")
    grid.add_row("held", f"{_join_numbers(timeline.in_flight)} microbatches on each device")
    grid.add_row("slots", f"{_join_numbers(table.slots)} activations of a stage")
    grid.add_row("stages", " | ".join(" ".join(map(str, row)) for row in table.placement.tolist()))
    ops = Text("\n".join(lines(table, width=width)), no_wrap=True)
    parts: list[RenderableType] = [Text(headline(result), style="bold"), ops, grid]
    if result.compared:
        parts.append(_comparison_grid(result, limit))
    return Group(*parts)


def _comparison_grid(result: ScheduleResult, limit: float | None) -> Grid:
    grid = Grid("schedule", "makespan", "bubble", "lock-step", "held at most", pad_edge=False)
    for table, timeline in result.compared:
        most = timeline.in_flight.max()
        over = f", over {limit:g}" if limit is not None and most > limit else ""
        numbers = (f"{timeline.makespan:g}", f"{timeline.bubble:.1%}", f"{timeline.lockstep:g}", f"{most:g}{over}")
        grid.add_row(table.name, *numbers, style="bold" if table.name == result.table.name else "")
    return grid


def _join_numbers(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)
