"""Validation of tables: every pass once, after what it needs, its activation in a slot of its own. NumPy only.

Every table is checked here before anything is compiled, whether a generator or a person wrote it. An error names the
cell (tick, device), the op, the microbatch and the chunk.
"""

import numpy as np

from ....configs.errors import UserError
from .dependencies import Event, Pass, event_of, produced_events, required_events, table_passes
from .list_schedule import label
from .table import VOCABULARY_OPS, Op, Table

Cell = tuple[int, int, Pass]  # tick, device, what is done there


def check_table(table: Table) -> None:
    """Raises UserError at the first cell that is wrong."""
    _check_shapes(table)
    cells = list(table_passes(table))
    for cell in cells:
        _check_numbers(table, cell)
    producers = _check_unique(table, cells)
    _check_complete(table, producers)
    _check_dependencies(table, cells, producers)
    _check_slots(table, cells)


def _error(table: Table, message: str) -> UserError:
    return UserError(f"schedule {table.name}: {message}")


def _describe(cell: Cell) -> str:
    tick, device, (op, microbatch, chunk) = cell
    suffix = "" if op in VOCABULARY_OPS else f" of chunk {chunk}"
    return f"tick {tick}, device {device}: {op.name} of microbatch {microbatch}{suffix}"


def _check_shapes(table: Table) -> None:
    shape = table.op.shape
    for field in ("op", "microbatch", "chunk", "slot"):
        array = getattr(table, field)
        if array.shape != shape or array.ndim != 2 or array.dtype.kind not in "iu":
            raise _error(
                table, f"{field} is {array.dtype}{array.shape}; all are integers of one shape [ticks, devices]"
            )
    stages = table.placement.size
    if table.placement.shape[:1] != shape[1:] or sorted(table.placement.ravel()) != list(range(stages)):
        raise _error(table, f"placement {table.placement.tolist()} does not put each stage 0 .. {stages - 1} in one of "
                            f"[{shape[1]} devices, chunks]")  # fmt: skip
    if table.algorithm not in (0, 1, 2):
        raise _error(table, f"algorithm {table.algorithm}; there are 0 (no vocabulary passes), 1 and 2")
    for tick, device in np.argwhere(~np.isin(table.op, list(Op))).tolist():
        known = ", ".join(f"{op:d} {op.name}" for op in Op)
        raise _error(table, f"tick {tick}, device {device}: op {table.op[tick, device]}; ops are {known}")
    for field in ("microbatch", "chunk", "slot"):
        for tick, device in np.argwhere((table.op == Op.IDLE) & (getattr(table, field) != -1)).tolist():
            raise _error(
                table, f"tick {tick}, device {device}: idle, with {field} {getattr(table, field)[tick, device]}; use -1"
            )


def _check_numbers(table: Table, cell: Cell) -> None:
    tick, device, (op, microbatch, chunk) = cell
    slot = int(table.slot[tick, device])
    if not 0 <= microbatch < table.microbatches:
        raise _error(table, f"{_describe(cell)}: microbatches are 0 .. {table.microbatches - 1}")
    if op in VOCABULARY_OPS:
        if not table.algorithm:
            raise _error(table, f"{_describe(cell)}: a vocabulary pass, in a table of algorithm 0; use 1 or 2")
        if (chunk, slot) != (-1, -1):
            raise _error(table, f"{_describe(cell)}: chunk {chunk}, slot {slot}; a vocabulary pass has -1 for both")
    elif not 0 <= chunk < table.chunks:
        raise _error(table, f"{_describe(cell)}: chunks are 0 .. {table.chunks - 1}")
    elif slot < 0:
        raise _error(table, f"{_describe(cell)}: slot {slot}; slots count from 0")


def _check_unique(table: Table, cells: list[Cell]) -> dict[Event, Cell]:
    """{event: the cell that produces it}; raises where two cells do."""
    producers: dict[Event, Cell] = {}
    for cell in cells:
        for event in produced_events(event_of(cell[2], device=cell[1], placement=table.placement)):
            if event in producers:
                raise _error(table, f"{_describe(cell)}: {label(event)} was done before, at "
                                    f"{_describe(producers[event])}; do every pass once")  # fmt: skip
            producers[event] = cell
    return producers


def _check_complete(table: Table, producers: dict[Event, Cell]) -> None:
    trains = any(event.op in (Op.I, Op.W, Op.T) for event in producers)
    required = [(op, table.stages) for op in ((Op.F, Op.I, Op.W) if trains else (Op.F,))]
    if table.algorithm:
        required += [(op, table.devices) for op in ((Op.S, Op.T) if trains else (Op.S,))]
    for op, locations in required:
        for microbatch in range(table.microbatches):
            for location in range(locations):
                if (missing := Event(op, microbatch, location)) not in producers:
                    device = location if op in VOCABULARY_OPS else table.device_of(location)
                    raise _error(table, f"device {device} never does {label(missing)}; every microbatch needs it once")


def _check_dependencies(table: Table, cells: list[Cell], producers: dict[Event, Cell]) -> None:
    shape = {"stages": table.stages, "devices": table.devices, "algorithm": table.algorithm}
    for cell in cells:
        for required in required_events(event_of(cell[2], device=cell[1], placement=table.placement), **shape):
            tick, device, _ = producers[required]
            if tick >= cell[0]:
                raise _error(table, f"{_describe(cell)} needs {label(required)}, which device {device} does at tick "
                                    f"{tick}; results can be used from the next tick on")  # fmt: skip


def _check_slots(table: Table, cells: list[Cell]) -> None:
    """No activation overwrites one that is still needed, and every read is from the slot that was written."""
    last_use: dict[tuple[int, int, int], int] = {}  # device, microbatch, chunk -> tick
    for tick, device, (op, microbatch, chunk) in cells:
        if op not in VOCABULARY_OPS:
            last_use[device, microbatch, chunk] = tick
    occupants: dict[tuple[int, int], tuple[int, int, int]] = {}  # device, slot -> device, microbatch, chunk
    for cell in cells:
        tick, device, (op, microbatch, chunk) = cell
        if op in VOCABULARY_OPS:
            continue
        slot, activation = int(table.slot[tick, device]), (device, microbatch, chunk)
        occupant = occupants.get((device, slot))
        if op is Op.F:
            if occupant is not None and last_use[occupant] >= tick:
                raise _error(table, f"{_describe(cell)}: slot {slot} holds microbatch {occupant[1]} of chunk "
                                    f"{occupant[2]} until tick {last_use[occupant]}; use another slot")  # fmt: skip
            occupants[device, slot] = activation
        elif occupant != activation:
            raise _error(table, f"{_describe(cell)}: slot {slot} does not hold its activation; use the slot of its F")
