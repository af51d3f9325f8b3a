"""A pass is one op of one microbatch somewhere; `needs` is the one statement of what it waits for. NumPy only.

Generators speak of passes in the order in which a device does them, the validator and the simulator ask what each
needs. A fused backward B stands for I and W: whoever waits for either waits for the B.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .table import VOCABULARY_OPS, Op


class Pass(NamedTuple):
    """One op as its device sees it; `chunk` is -1 for S and T."""

    op: Op
    microbatch: int
    chunk: int


class Event(NamedTuple):
    """One op as everybody sees it; `place` is a stage, and a device for S and T."""

    op: Op
    microbatch: int
    place: int


Orders = Sequence[Sequence[Pass]]  # [device] -> its passes, first to last


def event(one: Pass, *, device: int, placement: np.ndarray) -> Event:
    """A device's pass by the name others know it by."""
    return Event(one.op, one.microbatch, device if one.op in VOCABULARY_OPS else int(placement[device, one.chunk]))


def made(one: Event) -> tuple[Event, ...]:
    """What there is once a pass is done: itself, and both halves of a B."""
    return (one._replace(op=Op.I), one._replace(op=Op.W)) if one.op is Op.B else (one,)


def needs(one: Event, *, stages: int, devices: int, algorithm: int) -> tuple[Event, ...]:
    """What must be done before a pass may start."""
    op, microbatch, place = one
    everywhere = range(devices)
    if op is Op.F:
        return (one._replace(place=place - 1),) if place else ()
    if op is Op.W:
        return (one._replace(op=Op.I),)
    if op is Op.S:
        return (Event(Op.F, microbatch, stages - 1),)
    if op is Op.T:
        return tuple(Event(Op.S, microbatch, device) for device in everywhere)
    own = (Event(Op.F, microbatch, place),)
    if place < stages - 1:
        return (*own, Event(Op.I, microbatch, place + 1))
    barrier = {0: (), 1: (Op.T,), 2: (Op.S,)}[algorithm]
    return own + tuple(Event(op, microbatch, device) for op in barrier for device in everywhere)
