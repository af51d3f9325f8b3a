"""What a pass waits for. A pass is one op of one microbatch on one device. NumPy only.

Schedules list the passes of a device in order; the validator and the simulator ask `required_events` what each pass
needs. A fused backward B counts as both I and W: whatever waits for either waits for the B.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .table import VOCABULARY_OPS, Op, Table


class Pass(NamedTuple):
    """An op by the numbers of its own device; `chunk` is -1 for S and T."""

    op: Op
    microbatch: int
    chunk: int


class Event(NamedTuple):
    """An op by global numbers; `location` is a stage, for S and T a device."""

    op: Op
    microbatch: int
    location: int


Orders = Sequence[Sequence[Pass]]  # [device] -> its passes, first to last


def table_passes(table: Table) -> Iterator[tuple[int, int, Pass]]:
    """(tick, device, pass) of every cell that is not idle, by tick, then by device."""
    for tick, device in np.argwhere(table.op != Op.IDLE).tolist():
        op, microbatch, chunk = (int(array[tick, device]) for array in (table.op, table.microbatch, table.chunk))
        yield tick, device, Pass(Op(op), microbatch, chunk)


def event_of(step: Pass, *, device: int, placement: np.ndarray) -> Event:
    """The event of a device's pass."""
    return Event(step.op, step.microbatch, device if step.op in VOCABULARY_OPS else int(placement[device, step.chunk]))


def produced_events(event: Event) -> tuple[Event, ...]:
    """The events that are complete once a pass is done: itself, or both halves of a B."""
    return (event._replace(op=Op.I), event._replace(op=Op.W)) if event.op is Op.B else (event,)


def required_events(event: Event, *, stages: int, devices: int, algorithm: int) -> tuple[Event, ...]:
    """The events that must be complete before a pass may start."""
    op, microbatch, location = event
    if op is Op.F:
        return (event._replace(location=location - 1),) if location else ()
    if op is Op.W:
        return (event._replace(op=Op.I),)
    if op is Op.S:
        return (Event(Op.F, microbatch, stages - 1),)
    if op is Op.T:
        return tuple(Event(Op.S, microbatch, device) for device in range(devices))
    forward = Event(Op.F, microbatch, location)
    if location < stages - 1:
        return forward, Event(Op.I, microbatch, location + 1)
    barrier = {0: (), 1: (Op.T,), 2: (Op.S,)}[algorithm]
    return (forward, *(Event(op, microbatch, device) for op in barrier for device in range(devices)))
