"""Parity over the memory of a group of hosts: if one or two are lost, their snapshots are rebuilt from the others.

Each of n hosts has a snapshot, a string of bytes. It is split into blocks, and each block goes to another stripe. The
parity P of stripe s is stored on host s (and Q on host s + 1), and these hosts contribute no data to it. So a lost host
costs every stripe at most one block, of data or of parity. A code that bears the loss of m hosts (`max_lost_hosts`)
costs every host m / (n - m) of extra memory.

    m = 1    P = d0 + d1 + ...                             XOR: RAID-5 over memory
    m = 2    and Q = d0 + 2 d1 + 4 d2 + ...                over GF(2^8), polynomial 0x11D: RAID-6

Blocks are `uint8 [length]`. Sources: REFT, arXiv:2310.12670 (RAIM5 over a sharding group); H. P. Anvin, The mathematics
of RAID-6.
"""

from collections.abc import Mapping, Sequence

import numpy as np

POLYNOMIAL = 0x1D  # x^8 = x^4 + x^3 + x^2 + 1
Block = np.ndarray  # uint8 [length]


def stripe_hosts(stripe: int, *, hosts: int, max_lost_hosts: int) -> tuple[list[int], list[int]]:
    """Return (hosts with the data of a stripe, in order; hosts with its parity: P, then Q), as positions in the group.

    >>> stripe_hosts(1, hosts=4, max_lost_hosts=2)
    ([0, 3], [1, 2])
    """
    parity_hosts = [(stripe + number) % hosts for number in range(max_lost_hosts)]
    return [host for host in range(hosts) if host not in parity_hosts], parity_hosts


def stripes_of(host: int, *, hosts: int, max_lost_hosts: int) -> list[int]:
    """Return the stripes that contain data of a host, in the order of its blocks; `host`: position in the group."""
    data_hosts = [stripe_hosts(stripe, hosts=hosts, max_lost_hosts=max_lost_hosts)[0] for stripe in range(hosts)]
    return [stripe for stripe in range(hosts) if host in data_hosts[stripe]]


def block_length(length: int, *, hosts: int, max_lost_hosts: int) -> int:
    """Return the bytes of a block if the longest snapshot has `length` bytes; a multiple of 8 for the arithmetic."""
    return -(-length // (hosts - max_lost_hosts) // 8) * 8 if length else 8


def solve_stripe(data: Mapping[int, Block], parities: Sequence[Block | None], *, count: int) -> dict[int, Block]:
    """Compute the missing ones of `count` data blocks of a stripe, by number. `parities`: P, then Q; None: lost."""
    missing = [number for number in range(count) if number not in data]
    if not missing:
        return {}
    blocks = list(data.values())
    p = parities[0]
    if len(missing) == 1 and p is not None:
        return {missing[0]: xor([*blocks, p])}
    q = parities[1]
    weighted = [scale_block(power(2, number), block) for number, block in data.items()]
    if len(missing) == 1:
        return {missing[0]: scale_block(inverse(power(2, missing[0])), xor([*weighted, q]))}
    # P + P' = a + b and Q + Q' = g^i a + g^j b, of numbers i < j, give b = (Q + Q' + g^i (P + P')) / (g^i + g^j).
    low, high = missing
    sums = xor([*blocks, p])
    numerator = xor([*weighted, q, scale_block(power(2, low), sums)])
    solved = scale_block(inverse(power(2, low) ^ power(2, high)), numerator)
    return {low: xor([sums, solved]), high: solved}


def xor(blocks: Sequence[Block]) -> Block:
    """Return the sum of `blocks` over GF(2)."""
    result = blocks[0].copy()
    add(result, blocks[1:])
    return result


def add(total: Block, blocks: Sequence[Block]) -> None:
    """Add `blocks` to `total` over GF(2), in place."""
    words = total.view(np.uint64)
    for block in blocks:
        words ^= np.ascontiguousarray(block).view(np.uint64)


def add_doubling(total: Block, blocks: Sequence[Block]) -> None:
    """Double `total` over GF(2^8) before each of `blocks` is added to it, in place: Horner's rule, last block first."""
    words = total.view(np.uint64)
    low, high = np.uint64(0x7F7F7F7F7F7F7F7F), np.uint64(0x0101010101010101)
    for block in blocks:
        carry = (words >> np.uint64(7)) & high  # the top bit of every byte
        words[:] = ((words & low) << np.uint64(1)) ^ (carry * np.uint64(POLYNOMIAL))
        words ^= np.ascontiguousarray(block).view(np.uint64)


def multiply(a: int, b: int) -> int:
    """Return the product of `a` and `b` in GF(2^8).

    >>> multiply(0x80, 2) == POLYNOMIAL
    True
    """
    result = 0
    while b:
        if b & 1:
            result ^= a
        a = (a << 1) ^ (0x100 | POLYNOMIAL if a & 0x80 else 0)
        b >>= 1
    return result


def power(base: int, exponent: int) -> int:
    """Return `base` to the `exponent` in GF(2^8)."""
    result = 1
    for _ in range(exponent):
        result = multiply(result, base)
    return result


def inverse(value: int) -> int:
    """Return 1 / `value` in GF(2^8)."""
    return power(value, 254)


def scale_block(factor: int, block: Block) -> Block:
    """Return `factor` times each byte of `block` in GF(2^8), by a table of all products."""
    return np.array([multiply(value, factor) for value in range(256)], np.uint8)[block]
