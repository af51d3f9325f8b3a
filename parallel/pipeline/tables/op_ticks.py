"""When each operation of a table happens. NumPy only."""

import numpy as np

from .table import Op, Table

BACKWARD = (Op.I, Op.B)  # either gives the gradient of a stage's input
Ticks = dict[tuple[Op, int, int], int]


def occurrences(table: Table) -> Ticks:
    """(op, microbatch, stage) -> tick; for S and T, which have no stage, (op, microbatch, device)."""
    found = {}
    for tick, device in zip(*np.nonzero(table.op), strict=True):
        op, chunk = Op(int(table.op[tick, device])), int(table.chunk[tick, device])
        where = int(device) if op in (Op.S, Op.T) else int(table.placement[device, chunk])
        found[op, int(table.microbatch[tick, device]), where] = int(tick)
    return found


def backward_of(ticks: Ticks, microbatch: int, stage: int) -> int | None:
    """The tick of I or B; None in a table that only goes forward."""
    return next((ticks[op, microbatch, stage] for op in BACKWARD if (op, microbatch, stage) in ticks), None)
