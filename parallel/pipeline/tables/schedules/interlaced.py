"""Interlaced: the baseline that vocabulary parallelism is compared with. NumPy only.

Right behind the last forward of a microbatch all devices stop and do its S and T together, as tensor parallelism
would. F and a fused backward must fit between two such stops, in either order, so on every second hop a pass has to
wait for the next gap: an activation lives 1.5 times as long as in 1F1B, and a device holds about 1.5 p.

     S T F I W | S T F I W       odd hops from the last stage
     S T I W F | S T I W F       even ones

Sources: nnScaler, described in Vocabulary Parallelism, arXiv:2411.05288, section 5.2 and appendix.
"""

from ..list_schedule import tabulate
from ..placement import straight
from ..table import Op, Table
from .building_block import Block, hoisted, repeated
from .family import Family, Request

INTERVAL = 5  # S, T, F, I, W


def interlaced(request: Request) -> Table:
    """[ticks, devices]; data flows as in Algorithm 1, peak about 1.5 p."""
    block = interlaced_block(request.devices)
    orders = hoisted(repeated(block, interval=INTERVAL, microbatches=request.microbatches))
    return tabulate(orders, straight(request.devices), algorithm=1, name="interlaced")


def interlaced_block(devices: int) -> Block:
    """All S at one time and all T at the next; F, and I with its W, in the gaps between."""
    hops = [devices - 1 - i for i in range(devices)]
    # Ticks behind the last stage's forward, which ends a gap. Two hops forward take one interval, two hops back two.
    forward = [-INTERVAL * (hop // 2) - 2 * (hop % 2) for hop in hops]
    gradient = [3 + 2 * INTERVAL * (hop // 2) + 6 * (hop % 2) for hop in hops]
    return {
        (Op.F, 0): forward,
        (Op.I, 0): gradient,
        (Op.W, 0): [at + 1 for at in gradient],
        (Op.S, -1): [1] * devices,
        (Op.T, -1): [2] * devices,
    }


FAMILIES = {
    "interlaced": Family(interlaced, "baseline: all stop for each vocabulary pass; holds 1.5 p", vocabulary=(1,))
}
