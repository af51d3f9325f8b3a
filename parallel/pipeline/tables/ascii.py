"""A schedule as text: one line for each device, and in each tick the op's letter and the microbatch's number.

    device 0  F0 F1 .  .  I0 W0 I1 W1
    device 1  .  F0 I0 W0 F1 I1 W1 .

Small letters are the device's second chunk and all later ones; a picture (`svg.py`) shows each chunk.
"""

from .table import Op, Table

IDLE = "."


def lines(table: Table, *, width: int) -> list[str]:
    """One line for each device, of at most `width` characters; a longer schedule ends in ` ...`."""
    rows = [[cell(table, tick, device) for tick in range(table.ticks)] for device in range(table.devices)]
    cell_width = max(len(text) for row in rows for text in row)
    label_width = len(f"device {table.devices - 1}")
    fitting = (width - label_width - 1) // (cell_width + 1)
    ticks, suffix = (table.ticks, "") if table.ticks <= fitting else (max(fitting - 2, 0), " ...")
    return [
        f"{f'device {device}':{label_width}}  {' '.join(text.ljust(cell_width) for text in row[:ticks])}".rstrip()
        + suffix
        for device, row in enumerate(rows)
    ]


def cell(table: Table, tick: int, device: int) -> str:
    """Op and microbatch of a device in a tick, e.g. `F0`."""
    op = Op(int(table.op[tick, device]))
    if op == Op.IDLE:
        return IDLE
    letter = op.name if table.chunk[tick, device] < 1 else op.name.lower()
    return f"{letter}{table.microbatch[tick, device]}"
