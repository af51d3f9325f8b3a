"""Building blocks: one microbatch's passes at fixed offsets, repeated every `interval` ticks. NumPy only.

    device 0   F . . . . I W            offsets of F, I, W on each device; microbatch k does all of them
    device 1   . F . I W . .            k * interval ticks later

Sorting each device's passes by their time gives an order without deadlock, because whatever a pass needs is earlier;
list scheduling (`tabulate`) then removes the gaps at the beginning and the end. The lifetime of an activation in the
block, in intervals, is the number of activations that a device holds.

Source: Pipeline Parallelism with Controllable Memory, arXiv:2405.15362, section 3.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction

from ..dependencies import Pass
from ..table import Op

# (op, chunk; -1 for S and T) -> [device] offset in ticks; a fraction where only the order matters
Block = Mapping[tuple[Op, int], Sequence[int | Fraction]]


def repeat_block(block: Block, *, interval: int, microbatches: int) -> list[list[Pass]]:
    """The order of each device when the block is repeated for every microbatch."""
    devices = len(next(iter(block.values())))
    orders = []
    for device in range(devices):
        timed = [
            (offsets[device] + microbatch * interval, Pass(op, microbatch, chunk))
            for (op, chunk), offsets in block.items()
            for microbatch in range(microbatches)
        ]
        orders.append([step for _, step in sorted(timed)])
    return orders


def claim_offset(occupied: set[int], *, earliest: int, interval: int) -> int:
    """The first offset from `earliest` on that is not `occupied`, modulo the interval; adds it to `occupied`."""
    offset = next(tick for tick in range(earliest, earliest + interval) if tick % interval not in occupied)
    occupied.add(offset % interval)
    return offset


def hoist_warmup(orders: list[list[Pass]]) -> list[list[Pass]]:
    """Move to the front the forwards that fit before the last device has done its first: p - i on device i.

    A block whose forwards move slowly from device to device would leave its first ticks empty. These forwards are alive
    before the first backward anyway, so the peak does not change.
    """
    result = []
    for device, order in enumerate(orders):
        forwards = [step for step in order if step.op is Op.F][: len(orders) - device]
        result.append([*forwards, *(step for step in order if step not in forwards)])
    return result
