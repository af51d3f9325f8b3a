"""ZB-V, V-Half, V-Min: two stages a device in a V, so that every device holds the same. NumPy only.

    zb-v     peak p               no bubble between steps
    v-half   peak (p + 2) // 2    about half of 1F1B's
    v-min    peak (p + 4) // 3    about two thirds of 1F1B's, more where F, I and W are unequal

Peaks in microbatches of a whole device, two chunks of half a microbatch each. A V-Half or V-Min block starts at exact
offsets and repeats every six ticks; its ends are then squeezed under the block's own peak and W fill what is free.
ZB-V is written as an order. With vocabulary passes V-Half repeats every eight ticks, and the last stage's backward
waits one interval for each barrier: one microbatch more with Algorithm 2, two with Algorithm 1.

Sources: Pipeline Parallelism with Controllable Memory, arXiv:2405.15362; Zero Bubble, arXiv:2401.10241, section 6;
Vocabulary Parallelism, arXiv:2411.05288, section 5.
"""

import itertools
from collections.abc import Sequence

from ..dependencies import Pass
from ..list_schedule import tabulate
from ..placement import v_shaped
from ..table import Op, Table
from ..weight_gradient_fill import filled
from .building_block import Block, free_offset, repeated
from .family import Family, Request

INTERVAL = 6  # F, I and W of two chunks
VOCABULARY_INTERVAL = 8  # and S and T
BARRIERS = {0: 0, 1: 2, 2: 1}  # of an algorithm
# Passes a device chooses among. With vocabulary passes there is much to choose; without, more makes V-Min's ends worse.
WINDOW = {0: 2, 1: 16, 2: 16}


def zb_v(request: Request) -> Table:
    """[ticks, devices]; no device is idle between its first pass and its last where m >= 2p."""
    p, m = request.devices, request.microbatches
    placement = v_shaped(p)
    orders = [_zb_v_order(i, p, m) for i in range(p)]
    return tabulate(filled(orders, placement, limits=[2 * p] * p), placement, algorithm=0, name="zb-v")


def _zb_v_order(device: int, devices: int, microbatches: int) -> list[Pass]:
    """2p - 1 forwards, groups of the second chunk until the first one's backward arrives, then both in turn."""
    first = {op: iter([Pass(op, k, 0) for k in range(microbatches)]) for op in (Op.F, Op.I)}
    second = {op: iter([Pass(op, k, 1) for k in range(microbatches)]) for op in (Op.F, Op.I)}
    wanted = [first[Op.F]] * (2 * (devices - device) - 1)
    wanted += [second[Op.F], first[Op.F]] * device
    wanted += [second[Op.F], second[Op.I]] * (devices - 1 - device)
    wanted += [second[Op.F], second[Op.I], first[Op.F], first[Op.I]] * (microbatches + devices)
    return [one for source in wanted if (one := next(source, None)) is not None]


def v_half(request: Request) -> Table:
    """[ticks, devices]; peak (p + 2) // 2 microbatches, one more for each barrier of the vocabulary passes."""
    p = request.devices
    peak = (p + 2) // 2 + BARRIERS[request.vocabulary]
    if request.vocabulary:
        return _squeezed(
            request,
            vocabulary_block(p, algorithm=request.vocabulary),
            interval=VOCABULARY_INTERVAL,
            peak=peak,
            name="v-half",
        )
    return _squeezed(request, half_block(p), interval=INTERVAL, peak=peak, name="v-half")


def v_min(request: Request) -> Table:
    """[ticks, devices]; peak (p + 4) // 3 microbatches."""
    p = request.devices
    return _squeezed(request, min_block(p), interval=INTERVAL, peak=(p + 4) // 3, name="v-min")


def half_block(devices: int) -> Block:
    """V-Half's block; in the middle it waits until no two passes of a device meet."""
    return v_block(devices, hops=(2, 1, 2, 1), turns=(1, 4 if devices % 2 == 0 else 1, 2))


def min_block(devices: int) -> Block:
    """V-Min's block, likewise."""
    return v_block(devices, hops=(1, 1, 1, 1), turns=(1, 3 if devices % 3 == 0 else 1, 1))


def v_block(devices: int, *, hops: Sequence[int], turns: Sequence[int]) -> Block:
    """A microbatch down the V (F of chunk 0), up (F of chunk 1), down (I of chunk 1) and up (I of chunk 0).

    `hops`: ticks from device to device on each of the four ways; `turns`: ticks between them, at the three ends.
    """
    block, start = {}, 0
    for way, key in enumerate([(Op.F, 0), (Op.F, 1), (Op.I, 1), (Op.I, 0)]):
        steps = range(devices) if way % 2 == 0 else range(devices)[::-1]
        block[key] = [start + hops[way] * step for step in steps]
        start += hops[way] * (devices - 1) + (turns[way] if way < 3 else 0)
    return block


def vocabulary_block(devices: int, *, algorithm: int) -> Block:
    """V-Half's block over eight ticks, with S and T on every device.

    A hop down and a hop up take half an interval together, as in V-Half. The turns are the shortest with which no two
    passes of a device meet; at the middle one the last stage waits an interval for each barrier.
    """
    wait = VOCABULARY_INTERVAL * BARRIERS[algorithm]
    turns = sorted(
        itertools.product(range(1, VOCABULARY_INTERVAL + 1), repeat=3), key=lambda turns: (sum(turns), turns)
    )
    for first, middle, last in turns:
        block = v_block(devices, hops=(3, 1, 3, 1), turns=(first, wait + middle, last))
        taken = [{at % VOCABULARY_INTERVAL for at in places} for places in zip(*block.values(), strict=True)]
        if all(len(one) == len(block) for one in taken):
            break
    last_forward = block[Op.F, 1][0]
    logits = [free_offset(one, earliest=last_forward + 1, interval=VOCABULARY_INTERVAL) for one in taken]
    # All S are done an interval behind the last forward.
    behind = last_forward + VOCABULARY_INTERVAL + 1
    weights = [free_offset(one, earliest=behind, interval=VOCABULARY_INTERVAL) for one in taken]
    return {**block, (Op.S, -1): logits, (Op.T, -1): weights}


def _squeezed(request: Request, block: Block, *, interval: int, peak: int, name: str) -> Table:
    placement = v_shaped(request.devices)
    orders = repeated(block, interval=interval, microbatches=request.microbatches)
    limits = [2 * peak] * request.devices
    orders = filled(orders, placement, limits=limits, window=WINDOW[request.vocabulary], algorithm=request.vocabulary)
    return tabulate(orders, placement, algorithm=request.vocabulary, name=name)


FAMILIES = {
    "zb-v": Family(zb_v, "a V of two stages a device; no bubble between steps, p microbatches", (2, 2)),
    "v-half": Family(v_half, "half of 1F1B's activations, about half of its bubble", (2, 2), vocabulary=(0, 1, 2)),
    "v-min": Family(v_min, "a third of 1F1B's activations", (2, 2)),
}
