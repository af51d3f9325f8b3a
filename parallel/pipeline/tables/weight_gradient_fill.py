"""Weight gradients into the gaps: an order of F, I, S and T becomes one with W, under a memory limit. NumPy only.

Nothing waits for a W, so a device does one when it would otherwise be idle, or when it may hold no more activations
and the next pass is a forward: Zero Bubble Pipeline Parallelism, arXiv:2401.10241. A device whose next pass is not
ready may also do a later one, if its remaining order still keeps to the limit: that is how the gaps at both ends of a
repeated block close (arXiv:2405.15362, section 3). As the remaining orders stay within the limit, no device ever
waits for room.
"""

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .dependencies import Event, Orders, Pass, event, needs
from .table import Op


@dataclass
class _Device:
    """What one device has done and has still to do."""

    number: int
    limit: int  # activations
    todo: deque[Pass]
    order: list[Pass] = field(default_factory=list)
    weights: deque[Pass] = field(default_factory=deque)  # W that may be done
    unfinished: int = 0  # activations whose I is not done

    @property
    def held(self) -> int:
        return self.unfinished + len(self.weights)

    def take(self, place: int) -> Pass:
        """Do the pass at `place` of what is left."""
        one = self.todo[place]
        del self.todo[place]
        self.unfinished += (one.op is Op.F) - (one.op is Op.I)
        if one.op is Op.I:
            self.weights.append(one._replace(op=Op.W))
        self.order.append(one)
        return one

    def weigh(self) -> Pass:
        """Do the oldest W."""
        self.order.append(self.weights.popleft())
        return self.order[-1]


def filled(
    orders: Orders, placement: np.ndarray, *, limits: Sequence[int], window: int = 1, algorithm: int = 0
) -> list[list[Pass]]:
    """The orders with W: [device] -> passes.

    A device picks among the next `window` passes of its order; 1 keeps the order.

    `limits`: activations, of one microbatch and chunk, that each device may hold; at least what its order holds when
    every W follows its I at once. Passes that must come after each other must do so in the orders' own time.
    """
    devices = [_Device(i, limit, deque(order)) for i, (limit, order) in enumerate(zip(limits, orders, strict=True))]
    shape = {"stages": placement.size, "devices": len(orders), "algorithm": algorithm}
    done: set[Event] = set()
    while any(device.todo or device.weights for device in devices):
        now = []
        for device in devices:
            one = _next(device, window, done, placement, shape)
            if one is not None:
                now.append(event(one, device=device.number, placement=placement))
        if not now:
            raise AssertionError(f"orders wait in a circle, or limits {list(limits)} are below what they hold")
        done.update(now)  # usable from the next tick on
    return [device.order for device in devices]


def _next(device: _Device, window: int, done: set[Event], placement: np.ndarray, shape: dict[str, int]) -> Pass | None:
    """Do what this device does in this tick."""
    most = 0  # activations held at most while the passes before `place` are done
    change = 0
    for place, one in enumerate(list(itertools.islice(device.todo, window))):
        forward = one.op is Op.F
        if forward and device.unfinished + 1 + most > device.limit:
            pass  # done now, it would take the room of a pass before it
        elif all(need in done for need in needs(event(one, device=device.number, placement=placement), **shape)):
            if forward and device.held + 1 > device.limit:
                return device.weigh()
            return device.take(place)
        change += forward - (one.op is Op.I)
        most = max(most, change)
    return device.weigh() if device.weights else None
