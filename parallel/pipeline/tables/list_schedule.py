"""From the order of each device's passes to ticks and slots: list scheduling in unit time. NumPy only.

Each pass starts at the first tick after the device's previous pass and after everything it needs. Orders whose passes
wait for each other in a circle are refused, and the error prints the circle.
"""

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

from ....configs.errors import UserError
from .dependencies import Event, Orders, Pass, event_of, produced_events, required_events, table_passes
from .interval_coloring import color_intervals
from .table import VOCABULARY_OPS, Op, Table


def tabulate(orders: Orders, placement: np.ndarray, *, algorithm: int, name: str) -> Table:
    """The table in which every pass starts as early as the orders and its needs allow.

    Raises UserError for orders that deadlock.
    """
    placement = np.asarray(placement)
    ticks = start_ticks(orders, placement, algorithm=algorithm, name=name)
    length = max((row[-1] for row in ticks if row), default=-1) + 1
    op, microbatch, chunk = (np.full((length, len(orders)), fill, np.int32) for fill in (0, -1, -1))
    for device, (row, passes) in enumerate(zip(ticks, orders, strict=True)):
        op[row, device] = [step.op for step in passes]
        microbatch[row, device] = [step.microbatch for step in passes]
        chunk[row, device] = [step.chunk for step in passes]
    microbatches = int(microbatch.max(initial=-1)) + 1
    slot = assign_slots(op, microbatch, chunk)
    return Table(op, microbatch, chunk, slot, placement, microbatches, algorithm, name)


def assign_slots(op: np.ndarray, microbatch: np.ndarray, chunk: np.ndarray) -> np.ndarray:
    """The slot of every op [ticks, devices]: one pool a device, an activation alive from its first to its last use."""
    slot = np.full(op.shape, -1, np.int32)
    for device in range(op.shape[1]):
        uses: dict[tuple[int, int], list[int]] = {}
        for tick in np.nonzero((op[:, device] != Op.IDLE) & ~np.isin(op[:, device], VOCABULARY_OPS))[0].tolist():
            uses.setdefault((int(microbatch[tick, device]), int(chunk[tick, device])), []).append(tick)
        numbers, _ = color_intervals([(ticks[0], ticks[-1]) for ticks in uses.values()])
        for ticks, number in zip(uses.values(), numbers, strict=True):
            slot[ticks, device] = number
    return slot


def start_ticks(orders: Orders, placement: np.ndarray, *, algorithm: int, name: str) -> list[list[int]]:
    """The tick at which each pass of each device starts."""
    events = [[event_of(step, device=device, placement=placement) for step in row] for device, row in enumerate(orders)]
    shape = {"stages": placement.size, "devices": len(orders), "algorithm": algorithm}
    completed: dict[Event, int] = {}  # -> tick
    waiting: dict[Event, list[int]] = {}  # an event that is not complete -> devices that wait for it
    ticks: list[list[int]] = [[] for _ in orders]
    ready = deque(range(len(orders)))
    while ready:
        device = ready.popleft()
        while len(ticks[device]) < len(events[device]):
            event = events[device][len(ticks[device])]
            required = required_events(event, **shape)
            missing = next((need for need in required if need not in completed), None)
            if missing is not None:
                waiting.setdefault(missing, []).append(device)
                break
            previous = ticks[device][-1] if ticks[device] else -1
            tick = max([previous, *(completed[need] for need in required)]) + 1
            ticks[device].append(tick)
            for produced in produced_events(event):
                completed[produced] = tick
                ready.extend(waiting.pop(produced, ()))
    stuck = {device: events[device][len(row)] for device, row in enumerate(ticks) if len(row) < len(events[device])}
    if stuck:
        raise UserError(describe_deadlock(name, stuck, waiting, events))
    return ticks


def describe_deadlock(
    name: str, stuck: Mapping[int, Event], waiting: Mapping[Event, Sequence[int]], events: Sequence[Sequence[Event]]
) -> str:
    """The circle of passes that wait for each other, as one line."""
    producer = {produced: device for device, row in enumerate(events) for event in row
                for produced in produced_events(event)}  # fmt: skip
    missing = {device: need for need, devices in waiting.items() for device in devices}
    device, visited = min(stuck), []
    while device not in visited and missing.get(device) in producer:
        visited.append(device)
        device = producer[missing[device]]
    if device not in visited:
        return (f"schedule {name}: device {device} waits at {label(stuck[device])} for {label(missing[device])}, "
                f"which no device does; add it to the order of a device")  # fmt: skip
    links = [
        f"device {waiter} at {label(stuck[waiter])} for {label(missing[waiter])} of device {producer[missing[waiter]]}"
        for waiter in visited[visited.index(device) :]
    ]
    return f"schedule {name} never ends: {', which waits: '.join(links)}; change the order on one of these devices"


def label(event: Event) -> str:
    """An event for messages: `F(microbatch 0, stage 1)`."""
    kind = "device" if event.op in VOCABULARY_OPS else "stage"
    return f"{event.op.name}(microbatch {event.microbatch}, {kind} {event.location})"


def device_orders(table: Table) -> list[list[Pass]]:
    """The order of each device's passes; `tabulate` makes the same table of it again."""
    orders: list[list[Pass]] = [[] for _ in range(table.devices)]
    for _, device, step in table_passes(table):
        orders[device].append(step)
    return orders
