"""1F1B: as few forwards ahead as keep everybody busy, then one forward, one backward. NumPy only.

Stage i is p - i microbatches ahead of its backward, so a device holds at most p. With vocabulary passes the last
stage's backward waits one interval for each barrier, and every device is that many microbatches further ahead: p + 1
with Algorithm 2, p + 2 with Algorithm 1. All passes repeat at fixed offsets, so after the warm-up nobody is idle.

Sources: PipeDream-Flush as in Megatron-LM, arXiv:2104.04473; Vocabulary Parallelism, arXiv:2411.05288, section 5.
"""

import math
from fractions import Fraction

from ..dependencies import Pass
from ..list_schedule import tabulate
from ..placement import straight
from ..table import Op, Table
from .building_block import Block, free_offset, hoisted, repeated
from .family import Family, Request

# Of the interval, what a hop forward takes where there are vocabulary passes; a hop back takes the rest. Any share is a
# schedule. With F's own share of F, I and W the order suits a fused backward and short S and T as well.
FORWARD_SHARE = Fraction(1, 3)


def one_forward_one_backward(request: Request) -> Table:
    """[ticks, devices]; W directly behind its I."""
    if request.vocabulary:
        interval = 5  # F, I, W, S, T
        block = vocabulary_block(request.devices, interval=interval, algorithm=request.vocabulary)
        orders = hoisted(repeated(block, interval=interval, microbatches=request.microbatches))
    else:
        orders = [classic(request.devices - 1 - i, request.microbatches) for i in range(request.devices)]
    return tabulate(orders, straight(request.devices), algorithm=request.vocabulary, name="1f1b")


def classic(ahead: int, microbatches: int) -> list[Pass]:
    """A stage's order: `ahead` forwards, then forward, backward in turn, then the backwards that are left."""
    forwards = [[Pass(Op.F, k, 0)] for k in range(microbatches)]
    backwards = [[Pass(Op.I, k, 0), Pass(Op.W, k, 0)] for k in range(microbatches)]
    ahead = min(ahead, microbatches)
    pairs = zip(forwards[ahead:], backwards, strict=False)
    groups = [
        *forwards[:ahead],
        *(forward + backward for forward, backward in pairs),
        *backwards[microbatches - ahead :],
    ]
    return [one for group in groups for one in group]


def vocabulary_block(devices: int, *, interval: int, algorithm: int) -> Block:
    """1F1B's block with S and T on every device.

    Hop forward and hop back together take one interval, so F, I and W keep their distance modulo the interval on every
    device, and S and T find the two places that are left.
    """
    hop = FORWARD_SHARE * interval
    last_forward = hop * (devices - 1)
    wait = {1: 2 * interval + 1, 2: interval + 1}[algorithm]  # one interval for each barrier
    forward = [hop * i for i in range(devices)]
    gradient = [last_forward + wait + (interval - hop) * (devices - 1 - i) for i in range(devices)]
    logits, weights = [], []
    for start, back in zip(forward, gradient, strict=True):
        taken = {int(at - start) % interval for at in (start, back, back + 1)}
        behind = math.ceil(last_forward + 1 - start)
        logits.append(start + free_offset(taken, earliest=behind, interval=interval))
        # All S are done an interval behind the last forward.
        weights.append(start + free_offset(taken, earliest=behind + interval, interval=interval))
    return {
        (Op.F, 0): forward, (Op.I, 0): gradient, (Op.W, 0): [at + 1 for at in gradient],
        (Op.S, -1): logits, (Op.T, -1): weights,
    }  # fmt: skip


FAMILIES = {
    "1f1b": Family(
        one_forward_one_backward, "one forward, one backward in turn; holds p microbatches", vocabulary=(0, 1, 2)
    )
}
