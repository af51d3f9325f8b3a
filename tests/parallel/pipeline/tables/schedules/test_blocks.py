"""Building blocks: repeated, no device does two passes at once, and nothing is used before it is made."""

import pytest

from meshwright.parallel.pipeline.tables.placement import straight, v_shaped
from meshwright.parallel.pipeline.tables.schedules import interlaced, one_forward_one_backward
from meshwright.parallel.pipeline.tables.schedules import v_shaped as v
from meshwright.parallel.pipeline.tables.table import Op

# Name -> (block of p devices, its interval, its algorithm).
BLOCKS = {
    "v-half": (v.half_block, 6, 0),
    "v-min": (v.min_block, 6, 0),
    "v-half, algorithm 1": (lambda p: v.vocabulary_block(p, algorithm=1), 8, 1),
    "v-half, algorithm 2": (lambda p: v.vocabulary_block(p, algorithm=2), 8, 2),
    "1f1b, algorithm 1": (lambda p: one_forward_one_backward.vocabulary_block(p, interval=5, algorithm=1), 5, 1),
    "1f1b, algorithm 2": (lambda p: one_forward_one_backward.vocabulary_block(p, interval=5, algorithm=2), 5, 2),
    "interlaced": (interlaced.interlaced_block, 5, 1),
}
each_block = pytest.mark.parametrize(("block_of", "interval", "algorithm"), BLOCKS.values(), ids=BLOCKS)


@each_block
def test_no_two_passes_of_a_device_are_in_the_same_tick(block_of, interval, algorithm):
    for p in range(2, 33):
        for offsets in zip(*block_of(p).values(), strict=True):
            assert len({tick % interval for tick in offsets}) == len(offsets), p


@each_block
def test_every_pass_is_after_what_it_needs(block_of, interval, algorithm):
    for p in range(2, 33):
        block = block_of(p)
        chunks = {chunk for op, chunk in block if op is Op.F}
        placement = v_shaped(p) if len(chunks) == 2 else straight(p)
        offset_of = {(op, int(placement[d, chunk])): block[op, chunk][d]
              for op, chunk in block if chunk >= 0 for d in range(p)}  # fmt: skip
        last = placement.size - 1
        forwards, gradients = ([offset_of[op, s] for s in range(last + 1)] for op in (Op.F, Op.I))
        assert forwards == sorted(set(forwards)) and gradients[::-1] == sorted(set(gradients))
        assert forwards[last] < gradients[last]
        if algorithm:
            logits, weights = block[Op.S, -1], block[Op.T, -1]
            assert forwards[last] < min(logits) and max(logits) < min(weights)
            assert max(weights if algorithm == 1 else logits) < gradients[last]


@pytest.mark.parametrize("p", [2, 3, 4, 7, 12])
def test_offsets_are_the_published_ones(p):
    """Pipeline Parallelism with Controllable Memory: start of F and I of both chunks on device i."""
    half_delay, min_delay = 3 if p % 2 == 0 else 0, 2 if p % 3 == 0 else 0
    for i in range(p):
        assert [v.half_block(p)[key][i] for key in ((Op.F, 0), (Op.F, 1), (Op.I, 1), (Op.I, 0))] == [
            2 * i, 3 * p - 2 - i, 3 * p + half_delay - 1 + 2 * i, 6 * p + half_delay - 2 - i]  # fmt: skip
        assert [v.min_block(p)[key][i] for key in ((Op.F, 0), (Op.F, 1), (Op.I, 1), (Op.I, 0))] == [
            i, 2 * p - 1 - i, 2 * p + min_delay + i, 4 * p + min_delay - 1 - i]  # fmt: skip


def test_interlaced_leaves_room_for_a_fused_backward():
    """I of a stage comes after W of the next stage."""
    block = interlaced.interlaced_block(8)
    assert all(
        gradient > next_weight for gradient, next_weight in zip(block[Op.I, 0], block[Op.W, 0][1:], strict=False)
    )
