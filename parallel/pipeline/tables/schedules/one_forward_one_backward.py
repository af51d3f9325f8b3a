"""1F1B: a warm-up of as few forwards as keep all devices busy, then one forward and one backward in turn. NumPy only.

Stage i runs p - i microbatches ahead of its backward, so a device holds at most p. With vocabulary passes the last
stage's backward waits one interval for each barrier, and every device runs that many microbatches further ahead: p + 1
with Algorithm 2, p + 2 with Algorithm 1. All passes repeat at fixed offsets, so after the warm-up no device is idle.

Sources: PipeDream-Flush as in Megatron-LM, arXiv:2104.04473; Vocabulary Parallelism, arXiv:2411.05288, section 5.
"""

import math
from fractions import Fraction

from ..dependencies import Pass
from ..list_schedule import tabulate
from ..placement import straight
from ..table import Op, Table
from .building_block import Block, claim_offset, hoist_warmup, repeat_block
from .family import Family, Request

# Share of the interval between F on one device and on the next, with vocabulary passes; a hop back takes the rest. Any
# share is a schedule. With F's own share of F, I and W the order suits a fused backward and short S and T as well.
FORWARD_SHARE = Fraction(1, 3)


def one_forward_one_backward(request: Request) -> Table:
    """[ticks, devices]; W directly after its I."""
    if request.vocabulary:
        interval = 5  # F, I, W, S, T
        block = vocabulary_block(request.devices, interval=interval, algorithm=request.vocabulary)
        orders = hoist_warmup(repeat_block(block, interval=interval, microbatches=request.microbatches))
    else:
        orders = [classic_order(request.devices - 1 - i, request.microbatches) for i in range(request.devices)]
    return tabulate(orders, straight(request.devices), algorithm=request.vocabulary, name="1f1b")


def classic_order(warmup: int, microbatches: int) -> list[Pass]:
    """A stage's order: `warmup` forwards, then forward and backward in turn, then the remaining backwards."""
    forwards = [Pass(Op.F, k, 0) for k in range(microbatches)]
    backwards = [[Pass(Op.I, k, 0), Pass(Op.W, k, 0)] for k in range(microbatches)]
    warmup = min(warmup, microbatches)
    order = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        order += [forward, *backward]
    return order + [step for backward in backwards[microbatches - warmup :] for step in backward]


def vocabulary_block(devices: int, *, interval: int, algorithm: int) -> Block:
    """1F1B's block with S and T on every device.

    A hop forward and a hop back together take one interval, so F, I and W have the same offsets modulo the interval on
    every device, and S and T take the two offsets that remain.
    """
    hop = FORWARD_SHARE * interval
    last_forward = hop * (devices - 1)
    wait = {1: 2 * interval + 1, 2: interval + 1}[algorithm]  # one interval for each barrier
    forward = [hop * i for i in range(devices)]
    gradient = [last_forward + wait + (interval - hop) * (devices - 1 - i) for i in range(devices)]
    logits, weights = [], []
    for start, back in zip(forward, gradient, strict=True):
        occupied = {int(tick - start) % interval for tick in (start, back, back + 1)}
        earliest = math.ceil(last_forward + 1 - start)
        logits.append(start + claim_offset(occupied, earliest=earliest, interval=interval))
        # All S are done one interval after the last forward.
        weights.append(start + claim_offset(occupied, earliest=earliest + interval, interval=interval))
    return {
        (Op.F, 0): forward, (Op.I, 0): gradient, (Op.W, 0): [tick + 1 for tick in gradient],
        (Op.S, -1): logits, (Op.T, -1): weights,
    }  # fmt: skip


FAMILIES = {
    "1f1b": Family(
        one_forward_one_backward, "one forward, one backward in turn; holds p microbatches", vocabulary=(0, 1, 2)
    )
}
