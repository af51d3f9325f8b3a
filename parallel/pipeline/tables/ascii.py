"""A schedule as text: time to the right, a line a device, an op's letter and the microbatch's number in each tick.

    device 0  F0 F1 .  .  I0 W0 I1 W1
    device 1  .  F0 I0 W0 F1 I1 W1 .

Small letters are the device's second chunk; further ones are told apart in a picture only.
"""

from .table import Op, Table

IDLE = "."


def lines(table: Table, *, width: int) -> list[str]:
    """One string a device, of at most `width` characters; a longer schedule ends in ` ...`."""
    rows = [[cell(table, tick, device) for tick in range(table.ticks)] for device in range(table.devices)]
    wide = max(len(text) for row in rows for text in row)
    label = len(f"device {table.devices - 1}")
    room = (width - label - 1) // (wide + 1)
    shown, more = (table.ticks, "") if table.ticks <= room else (max(room - 2, 0), " ...")
    return [
        f"{f'device {device}':{label}}  {' '.join(text.ljust(wide) for text in row[:shown])}".rstrip() + more
        for device, row in enumerate(rows)
    ]


def cell(table: Table, tick: int, device: int) -> str:
    """What a device does in a tick, e.g. `F0`."""
    op = Op(int(table.op[tick, device]))
    if op == Op.IDLE:
        return IDLE
    letter = op.name if table.chunk[tick, device] < 1 else op.name.lower()
    return f"{letter}{table.microbatch[tick, device]}"
