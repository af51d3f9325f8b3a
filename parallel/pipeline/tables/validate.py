"""Is a table a schedule? Every pass once, behind what it needs, its activation in a place of its own. NumPy only.

Whatever writes a table, a generator or a person with a CSV, it is checked here before anything is compiled. A message
names the cell (tick, device), the op, the microbatch and the chunk.
"""

from collections.abc import Iterator

import numpy as np

from ....configs.errors import UserError
from .dependencies import Event, Pass, event, made, needs
from .list_schedule import label
from .table import VOCABULARY_OPS, Op, Table

Cell = tuple[int, int, Pass]  # tick, device, what is done there


def check(table: Table) -> None:
    """Raises UserError at the first cell that is wrong."""
    _check_shapes(table)
    cells = list(_cells(table))
    for cell in cells:
        _check_numbers(table, cell)
    done = _each_once(table, cells)
    _check_complete(table, done)
    _check_needs(table, cells, done)
    _check_slots(table, cells)


def _cells(table: Table) -> Iterator[Cell]:
    """The cells in which something is done, by tick."""
    for tick, device in np.argwhere(table.op != Op.IDLE).tolist():
        op, microbatch, chunk = (int(array[tick, device]) for array in (table.op, table.microbatch, table.chunk))
        if op not in set(Op):
            known = ", ".join(f"{one:d} {one.name}" for one in Op)
            raise _wrong(table, f"tick {tick}, device {device}: op {op}; ops are {known}")
        yield tick, device, Pass(Op(op), microbatch, chunk)


def _wrong(table: Table, message: str) -> UserError:
    return UserError(f"schedule {table.name}: {message}")


def _at(cell: Cell) -> str:
    tick, device, (op, microbatch, chunk) = cell
    where = "" if op in VOCABULARY_OPS else f" of chunk {chunk}"
    return f"tick {tick}, device {device}: {op.name} of microbatch {microbatch}{where}"


def _check_shapes(table: Table) -> None:
    shape = table.op.shape
    for field in ("op", "microbatch", "chunk", "slot"):
        array = getattr(table, field)
        if array.shape != shape or array.ndim != 2 or array.dtype.kind not in "iu":
            raise _wrong(
                table, f"{field} is {array.dtype}{array.shape}; all are integers of one shape [ticks, devices]"
            )
    stages = table.placement.size
    if table.placement.shape[:1] != shape[1:] or sorted(table.placement.ravel()) != list(range(stages)):
        raise _wrong(table, f"placement {table.placement.tolist()} does not put each stage 0 .. {stages - 1} in one of "
                            f"[{shape[1]} devices, chunks]")  # fmt: skip
    if table.algorithm not in (0, 1, 2):
        raise _wrong(table, f"algorithm {table.algorithm}; there are 0 (no vocabulary passes), 1 and 2")
    idle = table.op == Op.IDLE
    for field in ("microbatch", "chunk", "slot"):
        for tick, device in np.argwhere(idle & (getattr(table, field) != -1)).tolist():
            raise _wrong(
                table, f"tick {tick}, device {device}: idle, with {field} {getattr(table, field)[tick, device]}; use -1"
            )


def _check_numbers(table: Table, cell: Cell) -> None:
    tick, device, (op, microbatch, chunk) = cell
    slot = int(table.slot[tick, device])
    if not 0 <= microbatch < table.microbatches:
        raise _wrong(table, f"{_at(cell)}: microbatches are 0 .. {table.microbatches - 1}")
    if op in VOCABULARY_OPS:
        if not table.algorithm:
            raise _wrong(table, f"{_at(cell)}: a vocabulary pass, in a table of algorithm 0; use 1 or 2")
        if (chunk, slot) != (-1, -1):
            raise _wrong(table, f"{_at(cell)}: chunk {chunk}, slot {slot}; a vocabulary pass has -1 for both")
    elif not 0 <= chunk < table.chunks:
        raise _wrong(table, f"{_at(cell)}: chunks are 0 .. {table.chunks - 1}")
    elif slot < 0:
        raise _wrong(table, f"{_at(cell)}: slot {slot}; slots count from 0")


def _each_once(table: Table, cells: list[Cell]) -> dict[Event, Cell]:
    """{what was made: where}."""
    done: dict[Event, Cell] = {}
    for cell in cells:
        for result in made(event(cell[2], device=cell[1], placement=table.placement)):
            if result in done:
                raise _wrong(table, f"{_at(cell)}: {label(result)} was done before, at {_at(done[result])}")
            done[result] = cell
    return done


def _check_complete(table: Table, done: dict[Event, Cell]) -> None:
    trains = any(one.op in (Op.I, Op.W, Op.T) for one in done)
    wanted = [(op, table.stages) for op in ((Op.F, Op.I, Op.W) if trains else (Op.F,))]
    if table.algorithm:
        wanted += [(op, table.devices) for op in ((Op.S, Op.T) if trains else (Op.S,))]
    for op, places in wanted:
        for microbatch in range(table.microbatches):
            for place in range(places):
                if (missing := Event(op, microbatch, place)) not in done:
                    device = place if op in VOCABULARY_OPS else table.device_of(place)
                    raise _wrong(table, f"device {device} never does {label(missing)}; every microbatch needs it once")


def _check_needs(table: Table, cells: list[Cell], done: dict[Event, Cell]) -> None:
    shape = {"stages": table.stages, "devices": table.devices, "algorithm": table.algorithm}
    for cell in cells:
        for need in needs(event(cell[2], device=cell[1], placement=table.placement), **shape):
            tick, device, _ = done[need]
            if tick >= cell[0]:
                raise _wrong(table, f"{_at(cell)} needs {label(need)}, which device {device} does at tick {tick}; "
                                    f"results can be used from the next tick on")  # fmt: skip


def _check_slots(table: Table, cells: list[Cell]) -> None:
    """No activation is written over another that is still needed, and each is looked for where it was put."""
    last: dict[tuple[int, int, int], int] = {}  # device, microbatch, chunk -> tick of its last use
    for tick, device, (op, microbatch, chunk) in cells:
        if op not in VOCABULARY_OPS:
            last[device, microbatch, chunk] = tick
    owner: dict[tuple[int, int], tuple[int, int, int]] = {}  # device, slot -> who is in it
    for cell in cells:
        tick, device, (op, microbatch, chunk) = cell
        if op in VOCABULARY_OPS:
            continue
        slot, who = int(table.slot[tick, device]), (device, microbatch, chunk)
        there = owner.get((device, slot))
        if op is Op.F:
            if there is not None and last[there] >= tick:
                raise _wrong(table, f"{_at(cell)}: slot {slot} holds microbatch {there[1]} of chunk {there[2]} "
                                    f"until tick {last[there]}")  # fmt: skip
            owner[device, slot] = who
        elif there != who:
            raise _wrong(table, f"{_at(cell)}: slot {slot} does not hold its activation; use the slot of its F")
