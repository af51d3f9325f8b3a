"""Weight gradients in the gaps: adds W to an order of F, I, S and T, under a memory limit. NumPy only.

Nothing waits for a W, so a device does one when it would otherwise be idle, or when it may hold no more activations
and the next pass is a forward: Zero Bubble Pipeline Parallelism, arXiv:2401.10241. A device whose next pass is not
ready may also do a later one, if its remaining order still keeps to the limit: this closes the gaps at both ends of a
repeated block (arXiv:2405.15362, section 3). As the remaining orders stay within the limit, no device ever waits for
memory.
"""

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .dependencies import Event, Orders, Pass, event_of, required_events
from .table import Op


@dataclass
class _Device:
    """What one device has done and has still to do."""

    number: int
    limit: int  # activations
    remaining: deque[Pass]
    order: list[Pass] = field(default_factory=list)  # done
    weights: deque[Pass] = field(default_factory=deque)  # W that may be done
    unfinished: int = 0  # activations whose I is not done

    @property
    def activations(self) -> int:
        return self.unfinished + len(self.weights)

    def run_remaining(self, index: int) -> Pass:
        """Do the remaining pass at `index`."""
        step = self.remaining[index]
        del self.remaining[index]
        self.unfinished += (step.op is Op.F) - (step.op is Op.I)
        if step.op is Op.I:
            self.weights.append(step._replace(op=Op.W))
        self.order.append(step)
        return step

    def run_weight_gradient(self) -> Pass:
        """Do the oldest W."""
        self.order.append(self.weights.popleft())
        return self.order[-1]


def fill_weight_gradients(
    orders: Orders, placement: np.ndarray, *, limits: Sequence[int], window: int = 1, algorithm: int = 0
) -> list[list[Pass]]:
    """The orders with W: [device] -> passes.

    A device chooses among the next `window` passes of its order; 1 keeps the order.

    `limits`: activations, of one microbatch and chunk, that each device may hold; at least what its order holds when
    every W directly follows its I. Passes that depend on each other must be in that order in `orders`.
    """
    devices = [_Device(i, limit, deque(order)) for i, (limit, order) in enumerate(zip(limits, orders, strict=True))]
    shape = {"stages": placement.size, "devices": len(orders), "algorithm": algorithm}
    complete: set[Event] = set()
    while any(device.remaining or device.weights for device in devices):
        events = []
        for device in devices:
            step = _run_tick(device, window, complete, placement, shape)
            if step is not None:
                events.append(event_of(step, device=device.number, placement=placement))
        if not events:
            raise AssertionError(f"orders wait in a circle, or limits {list(limits)} are below what they hold")
        complete.update(events)  # usable from the next tick on
    return [device.order for device in devices]


def _run_tick(
    device: _Device, window: int, complete: set[Event], placement: np.ndarray, shape: dict[str, int]
) -> Pass | None:
    """Do the pass that this device does in this tick; None: it is idle."""
    most = 0  # most activations that the passes before `index` add
    change = 0
    for index, step in enumerate(list(itertools.islice(device.remaining, window))):
        forward = step.op is Op.F
        event = event_of(step, device=device.number, placement=placement)
        if forward and device.unfinished + 1 + most > device.limit:
            pass  # done now, it would take the memory of a pass before it
        elif all(required in complete for required in required_events(event, **shape)):
            if forward and device.activations + 1 > device.limit:
                return device.run_weight_gradient()
            return device.run_remaining(index)
        change += forward - (step.op is Op.I)
        most = max(most, change)
    return device.run_weight_gradient() if device.weights else None
