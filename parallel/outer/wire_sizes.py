"""How much a wire format takes. No JAX: plans and the simulator read it.

A format is bits of a value and of a block's scale; blocks run along the last dimension, so that no shard of another
dimension changes them.
"""

import math
from typing import NamedTuple

BLOCK = 64  # values that share a scale: half a bit a value, and it divides what a tensor shard holds of most models


class Width(NamedTuple):
    """Bits a format spends."""

    value: int
    scale: int  # a block; 0: no scales


WIDTHS = {
    "float32": Width(32, 0),
    "bf16": Width(16, 0),
    "fp8": Width(8, 32),
    "int8": Width(8, 32),
    "e3m0": Width(4, 32),
}


def block_size(length: int) -> int:
    """Values of a block along a dimension of `length`: even, `BLOCK` at most, and dividing the length where it can.

    >>> block_size(192), block_size(40), block_size(61), block_size(100)
    (64, 40, 62, 50)
    """
    if length <= BLOCK:
        return length + length % 2
    return next((size for size in range(BLOCK, 15, -2) if length % size == 0), BLOCK)


def coded_bytes(wire: str, shape: tuple[int, ...]) -> int:
    """Bytes of an array of `shape` in format `wire`, scales and filled-up blocks included.

    >>> coded_bytes("float32", (2, 128)), coded_bytes("e3m0", (2, 128))
    (1024, 144)
    """
    width = WIDTHS[wire]
    *rows, length = shape or (1,)
    if not width.scale:
        return math.prod(rows) * length * width.value // 8
    block = block_size(length)
    blocks = math.prod(rows) * -(-length // block)
    return blocks * (block * width.value + width.scale) // 8
