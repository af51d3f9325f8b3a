"""ZB-V, V-Half, V-Min: two stages on each device in a V, so that every device holds the same. NumPy only.

    zb-v     peak p               no bubble between steps
    v-half   peak (p + 2) // 2    bubble about half of 1F1B's
    v-min    peak (p + 4) // 3    bubble about two thirds of 1F1B's, more if F, I and W are unequal

Peaks are in microbatches of all chunks of a device: two chunks of half a microbatch each. A V-Half or V-Min block has
exact offsets and repeats every six ticks; its ends are then compressed under the block's own peak, and W fills the
gaps. ZB-V is defined by its order. With vocabulary passes V-Half repeats every eight ticks, and the last stage's
backward waits one interval for each barrier: one microbatch more with Algorithm 2, two with Algorithm 1.

Sources: Pipeline Parallelism with Controllable Memory, arXiv:2405.15362; Zero Bubble, arXiv:2401.10241, section 6;
Vocabulary Parallelism, arXiv:2411.05288, section 5.
"""

import itertools
from collections.abc import Sequence

from ..dependencies import Pass
from ..list_schedule import tabulate
from ..placement import v_shaped
from ..table import Op, Table
from ..weight_gradient_fill import fill_weight_gradients
from .building_block import Block, claim_offset, repeat_block
from .family import Family, Request

INTERVAL = 6  # F, I and W of two chunks
VOCABULARY_INTERVAL = 8  # the same, S and T
BARRIERS = {0: 0, 1: 2, 2: 1}  # algorithm -> barriers before the last stage's backward
# algorithm -> passes a device chooses among. Without vocabulary passes a larger window makes V-Min's ends worse.
WINDOW = {0: 2, 1: 16, 2: 16}


def zb_v(request: Request) -> Table:
    """[ticks, devices]; if m >= 2p, no device is idle between its first pass and its last."""
    p, m = request.devices, request.microbatches
    placement = v_shaped(p)
    orders = [_zb_v_order(i, p, m) for i in range(p)]
    return tabulate(fill_weight_gradients(orders, placement, limits=[2 * p] * p), placement, algorithm=0, name="zb-v")


def _zb_v_order(device: int, devices: int, microbatches: int) -> list[Pass]:
    """2p - 1 forwards, groups of the second chunk until the first one's backward arrives, then both in turn."""
    first = {op: iter([Pass(op, k, 0) for k in range(microbatches)]) for op in (Op.F, Op.I)}
    second = {op: iter([Pass(op, k, 1) for k in range(microbatches)]) for op in (Op.F, Op.I)}
    sources = [first[Op.F]] * (2 * (devices - device) - 1)
    sources += [second[Op.F], first[Op.F]] * device
    sources += [second[Op.F], second[Op.I]] * (devices - 1 - device)
    sources += [second[Op.F], second[Op.I], first[Op.F], first[Op.I]] * (microbatches + devices)
    return [step for source in sources if (step := next(source, None)) is not None]


def v_half(request: Request) -> Table:
    """[ticks, devices]; peak (p + 2) // 2 microbatches, one more for each barrier of the vocabulary passes."""
    p = request.devices
    block, interval = half_block(p), INTERVAL
    if request.vocabulary:
        block, interval = vocabulary_block(p, algorithm=request.vocabulary), VOCABULARY_INTERVAL
    peak = (p + 2) // 2 + BARRIERS[request.vocabulary]
    return _compress(request, block, interval=interval, peak=peak, name="v-half")


def v_min(request: Request) -> Table:
    """[ticks, devices]; peak (p + 4) // 3 microbatches."""
    p = request.devices
    return _compress(request, min_block(p), interval=INTERVAL, peak=(p + 4) // 3, name="v-min")


def half_block(devices: int) -> Block:
    """V-Half's block; its middle turn is long enough that no two passes of a device are in the same tick."""
    return v_block(devices, hops=(2, 1, 2, 1), turns=(1, 4 if devices % 2 == 0 else 1, 2))


def min_block(devices: int) -> Block:
    """V-Min's block; its middle turn is long enough that no two passes of a device are in the same tick."""
    return v_block(devices, hops=(1, 1, 1, 1), turns=(1, 3 if devices % 3 == 0 else 1, 1))


def v_block(devices: int, *, hops: Sequence[int], turns: Sequence[int]) -> Block:
    """A microbatch down the V (F of chunk 0), up (F of chunk 1), down (I of chunk 1) and up (I of chunk 0).

    `hops`: ticks from device to device in each of the four passages; `turns`: ticks between them, at the three turns.
    """
    block, start = {}, 0
    for number, key in enumerate([(Op.F, 0), (Op.F, 1), (Op.I, 1), (Op.I, 0)]):
        distances = range(devices) if number % 2 == 0 else range(devices)[::-1]
        block[key] = [start + hops[number] * distance for distance in distances]
        start += hops[number] * (devices - 1) + (turns[number] if number < 3 else 0)
    return block


def vocabulary_block(devices: int, *, algorithm: int) -> Block:
    """V-Half's block over eight ticks, with S and T on every device.

    A hop down and a hop up take half an interval together, as in V-Half. The turns are the shortest with which no two
    passes of a device are in the same tick; at the middle turn the last stage waits one interval for each barrier.
    """
    wait = VOCABULARY_INTERVAL * BARRIERS[algorithm]
    turns = sorted(
        itertools.product(range(1, VOCABULARY_INTERVAL + 1), repeat=3), key=lambda turns: (sum(turns), turns)
    )
    for first, middle, last in turns:
        block = v_block(devices, hops=(3, 1, 3, 1), turns=(first, wait + middle, last))
        occupied = [{tick % VOCABULARY_INTERVAL for tick in offsets} for offsets in zip(*block.values(), strict=True)]
        if all(len(offsets) == len(block) for offsets in occupied):
            break
    earliest = block[Op.F, 1][0] + 1  # after the last forward
    logits = [claim_offset(offsets, earliest=earliest, interval=VOCABULARY_INTERVAL) for offsets in occupied]
    earliest += VOCABULARY_INTERVAL  # all S are done one interval after the last forward
    weights = [claim_offset(offsets, earliest=earliest, interval=VOCABULARY_INTERVAL) for offsets in occupied]
    return {**block, (Op.S, -1): logits, (Op.T, -1): weights}


def _compress(request: Request, block: Block, *, interval: int, peak: int, name: str) -> Table:
    placement = v_shaped(request.devices)
    orders = repeat_block(block, interval=interval, microbatches=request.microbatches)
    limits = [2 * peak] * request.devices
    orders = fill_weight_gradients(
        orders, placement, limits=limits, window=WINDOW[request.vocabulary], algorithm=request.vocabulary
    )
    return tabulate(orders, placement, algorithm=request.vocabulary, name=name)


FAMILIES = {
    "zb-v": Family(zb_v, "a V of two stages a device; no bubble between steps, p microbatches", (2, 2)),
    "v-half": Family(v_half, "half of 1F1B's activations, about half of its bubble", (2, 2), vocabulary=(0, 1, 2)),
    "v-min": Family(v_min, "a third of 1F1B's activations", (2, 2)),
}
