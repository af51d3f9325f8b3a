"""Interlaced: the baseline that vocabulary parallelism is compared with. NumPy only.

Directly after the last forward of a microbatch all devices do its S and T at the same time, as tensor parallelism
would. F and a fused backward must fit between two such synchronizations, in either order, so at every second device a
pass waits for the next gap: an activation lives 1.5 times as long as in 1F1B, and a device holds about 1.5 p.

     S T F I W | S T F I W       an odd number of devices before the last one
     S T I W F | S T I W F       an even number

Source: nnScaler, described in Vocabulary Parallelism, arXiv:2411.05288, section 5.2 and appendix.
"""

from ..list_schedule import tabulate
from ..placement import straight
from ..table import Op, Table
from .building_block import Block, hoist_warmup, repeat_block
from .family import Family, Request

INTERVAL = 5  # S, T, F, I, W


def interlaced(request: Request) -> Table:
    """[ticks, devices]; the exchanges of Algorithm 1, peak about 1.5 p microbatches."""
    block = interlaced_block(request.devices)
    orders = hoist_warmup(repeat_block(block, interval=INTERVAL, microbatches=request.microbatches))
    return tabulate(orders, straight(request.devices), algorithm=1, name="interlaced")


def interlaced_block(devices: int) -> Block:
    """All S in one tick and all T in the next; F, and I with its W, in the gaps between."""
    hops = [devices - 1 - i for i in range(devices)]  # from each device to the last one
    # Ticks after the last stage's forward, which ends a gap. Two hops forward take one interval, two hops back two.
    forward = [-INTERVAL * (hop // 2) - 2 * (hop % 2) for hop in hops]
    gradient = [3 + 2 * INTERVAL * (hop // 2) + 6 * (hop % 2) for hop in hops]
    return {
        (Op.F, 0): forward,
        (Op.I, 0): gradient,
        (Op.W, 0): [tick + 1 for tick in gradient],
        (Op.S, -1): [1] * devices,
        (Op.T, -1): [2] * devices,
    }


FAMILIES = {
    "interlaced": Family(interlaced, "baseline: all stop for each vocabulary pass; holds 1.5 p", vocabulary=(1,))
}
