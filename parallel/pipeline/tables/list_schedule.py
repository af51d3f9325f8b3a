"""From the order in which each device does its passes to ticks and slots: list scheduling in unit time. NumPy only.

Each pass starts at the first tick behind the device's previous pass and behind everything it needs. Orders that wait
for each other in a circle are refused, and the circle is printed.
"""

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

from ....configs.errors import UserError
from .dependencies import Event, Orders, Pass, event, made, needs
from .interval_coloring import colour
from .table import VOCABULARY_OPS, Op, Table


def tabulate(orders: Orders, placement: np.ndarray, *, algorithm: int, name: str) -> Table:
    """The table in which every pass starts as early as the orders and its needs allow.

    Raises UserError for orders that no clock can run.
    """
    placement = np.asarray(placement)
    ticks = start_ticks(orders, placement, algorithm=algorithm, name=name)
    length = max((row[-1] for row in ticks if row), default=-1) + 1
    op, microbatch, chunk = (np.full((length, len(orders)), fill, np.int32) for fill in (0, -1, -1))
    for device, (row, passes) in enumerate(zip(ticks, orders, strict=True)):
        op[row, device] = [one.op for one in passes]
        microbatch[row, device] = [one.microbatch for one in passes]
        chunk[row, device] = [one.chunk for one in passes]
    microbatches = int(microbatch.max(initial=-1)) + 1
    slot = coloured(op, microbatch, chunk)
    return Table(op, microbatch, chunk, slot, placement, microbatches, algorithm, name)


def coloured(op: np.ndarray, microbatch: np.ndarray, chunk: np.ndarray) -> np.ndarray:
    """The slot of every op [ticks, devices]: one pool a device, an activation alive from its first to its last use."""
    slot = np.full(op.shape, -1, np.int32)
    for device in range(op.shape[1]):
        uses: dict[tuple[int, int], list[int]] = {}
        for tick in np.nonzero((op[:, device] != Op.IDLE) & ~np.isin(op[:, device], VOCABULARY_OPS))[0].tolist():
            uses.setdefault((int(microbatch[tick, device]), int(chunk[tick, device])), []).append(tick)
        places, _ = colour([(ticks[0], ticks[-1]) for ticks in uses.values()])
        for ticks, place in zip(uses.values(), places, strict=True):
            slot[ticks, device] = place
    return slot


def start_ticks(orders: Orders, placement: np.ndarray, *, algorithm: int, name: str) -> list[list[int]]:
    """The tick at which each pass of each device starts."""
    events = [[event(one, device=device, placement=placement) for one in row] for device, row in enumerate(orders)]
    shape = {"stages": placement.size, "devices": len(orders), "algorithm": algorithm}
    done: dict[Event, int] = {}
    waiting: dict[Event, list[int]] = {}  # what is not done yet -> devices that wait for it
    ticks: list[list[int]] = [[] for _ in orders]
    ready = deque(range(len(orders)))
    while ready:
        device = ready.popleft()
        while len(ticks[device]) < len(events[device]):
            one = events[device][len(ticks[device])]
            wanted = needs(one, **shape)
            missing = next((need for need in wanted if need not in done), None)
            if missing is not None:
                waiting.setdefault(missing, []).append(device)
                break
            before = ticks[device][-1] if ticks[device] else -1
            tick = max([before, *(done[need] for need in wanted)]) + 1
            ticks[device].append(tick)
            for result in made(one):
                done[result] = tick
                ready.extend(waiting.pop(result, ()))
    stuck = {device: events[device][len(row)] for device, row in enumerate(ticks) if len(row) < len(events[device])}
    if stuck:
        raise UserError(deadlock(name, stuck, waiting, events))
    return ticks


def deadlock(
    name: str, stuck: Mapping[int, Event], waiting: Mapping[Event, Sequence[int]], events: Sequence[Sequence[Event]]
) -> str:
    """The chain of passes that wait for each other, as one line."""
    holder = {result: device for device, row in enumerate(events) for one in row for result in made(one)}
    wants = {device: need for need, devices in waiting.items() for device in devices}
    device, seen = min(stuck), []
    while device not in seen and wants.get(device) in holder:
        seen.append(device)
        device = holder[wants[device]]
    if device not in seen:
        return (f"schedule {name}: device {device} waits at {label(stuck[device])} for {label(wants[device])}, "
                f"which nobody does; add it to the order of a device")  # fmt: skip
    chain = seen[seen.index(device) :]
    links = [
        f"device {one} at {label(stuck[one])} for {label(wants[one])} of device {holder[wants[one]]}" for one in chain
    ]
    return f"schedule {name} never ends: {', which waits: '.join(links)}; change the order on one of these devices"


def label(one: Event) -> str:
    """A pass in a few words."""
    where = "device" if one.op in VOCABULARY_OPS else "stage"
    return f"{one.op.name}(microbatch {one.microbatch}, {where} {one.place})"


def orders_of(table: Table) -> list[list[Pass]]:
    """The order in which each device does its passes: `tabulate` makes a table of it again."""
    orders: list[list[Pass]] = [[] for _ in range(table.devices)]
    for tick, device in np.argwhere(table.op != Op.IDLE).tolist():
        op, microbatch, chunk = (int(array[tick, device]) for array in (table.op, table.microbatch, table.chunk))
        orders[device].append(Pass(Op(op), microbatch, chunk))
    return orders
