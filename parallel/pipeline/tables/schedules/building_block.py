"""Building blocks: one microbatch's passes at fixed offsets, repeated every `interval` ticks. NumPy only.

    device 0   F . . . . I W            offsets of F, I, W on each device; microbatch k does all of them
    device 1   . F . I W . .            k * interval ticks later

Sorting each device's passes by their time gives an order in which nothing waits in a circle, because whatever a pass
needs is earlier; squeezing the order (`listing.tabulate`) then removes the gaps of its beginning and end. How long an
activation lives in the block, in intervals, is how many of it a device holds.

Source: Pipeline Parallelism with Controllable Memory, arXiv:2405.15362, section 3.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction

from ..dependencies import Pass
from ..table import Op

# (op, chunk; -1 for S and T) -> [device] offset in ticks; a fraction where only the order matters
Block = Mapping[tuple[Op, int], Sequence[int | Fraction]]


def repeated(block: Block, *, interval: int, microbatches: int) -> list[list[Pass]]:
    """The order of each device when the block is repeated for every microbatch."""
    devices = len(next(iter(block.values())))
    orders = []
    for device in range(devices):
        timed = [
            (offsets[device] + microbatch * interval, Pass(op, microbatch, chunk))
            for (op, chunk), offsets in block.items()
            for microbatch in range(microbatches)
        ]
        orders.append([one for _, one in sorted(timed)])
    return orders


def free_offset(taken: set[int], *, earliest: int, interval: int) -> int:
    """The first offset from `earliest` on whose place in the interval nothing takes; takes it."""
    offset = next(at for at in range(earliest, earliest + interval) if at % interval not in taken)
    taken.add(offset % interval)
    return offset


def hoisted(orders: list[list[Pass]]) -> list[list[Pass]]:
    """The orders with the forwards in front that fit before the last device has done its first: p - i on device i.

    A block whose forwards hop slowly would leave its first ticks empty; these forwards are alive before the first
    backward anyway, so the peak stays.
    """
    hoisted = []
    for device, order in enumerate(orders):
        forwards = [one for one in order if one.op is Op.F][: len(orders) - device]
        hoisted.append([*forwards, *(one for one in order if one not in forwards)])
    return hoisted
