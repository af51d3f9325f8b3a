"""The tick of each op of a table. NumPy only."""

from .dependencies import event_of, table_passes
from .table import Op, Table

BACKWARD = (Op.I, Op.B)  # either gives the gradient of a stage's input
Ticks = dict[tuple[Op, int, int], int]


def op_ticks(table: Table) -> Ticks:
    """(op, microbatch, stage) -> tick; for S and T, which have no stage, (op, microbatch, device) -> tick."""
    return {
        tuple(event_of(step, device=device, placement=table.placement)): tick
        for tick, device, step in table_passes(table)
    }


def backward_tick(ticks: Ticks, microbatch: int, stage: int) -> int | None:
    """The tick of I or B; None in a table that only goes forward."""
    return next((ticks[op, microbatch, stage] for op in BACKWARD if (op, microbatch, stage) in ticks), None)
