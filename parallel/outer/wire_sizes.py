"""The size of arrays in each wire format. No JAX: plans and the simulator read it.

A format has bits for each value and for each block's scale; blocks run along the last dimension, so that sharding
another dimension changes no block.
"""

import math
from typing import NamedTuple

BLOCK = 64  # values that share a scale: half a bit a value, and it divides what a tensor shard holds of most models


class FormatBits(NamedTuple):
    """Bits of a format."""

    value: int
    scale: int  # for each block; 0: no scales


FORMAT_BITS = {
    "float32": FormatBits(32, 0),
    "bf16": FormatBits(16, 0),
    "fp8": FormatBits(8, 32),
    "int8": FormatBits(8, 32),
    "e3m0": FormatBits(4, 32),
}


def block_size(length: int) -> int:
    """Values of a block along a dimension of `length`: even, at most `BLOCK`, and a divisor of the length if possible.

    >>> block_size(192), block_size(40), block_size(61), block_size(100)
    (64, 40, 62, 50)
    """
    if length <= BLOCK:
        return length + length % 2
    return next((size for size in range(BLOCK, 15, -2) if length % size == 0), BLOCK)


def coded_bytes(wire: str, shape: tuple[int, ...]) -> int:
    """Bytes of an array of `shape` in format `wire`, with scales and padded blocks.

    >>> coded_bytes("float32", (2, 128)), coded_bytes("e3m0", (2, 128))
    (1024, 144)
    """
    bits = FORMAT_BITS[wire]
    *rows, length = shape or (1,)
    if not bits.scale:
        return math.prod(rows) * length * bits.value // 8
    block = block_size(length)
    blocks = math.prod(rows) * -(-length // block)
    return blocks * (block * bits.value + bits.scale) // 8
