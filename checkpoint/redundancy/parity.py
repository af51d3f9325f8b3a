"""Parity over the memory of a group of hosts: one or two may be lost, and their snapshots come back from the others'.

Each of n hosts has a snapshot, a string of bytes. It is cut into blocks, and block after block goes to another stripe;
stripe s keeps its parity on host s (and its second one on host s + 1), and these hosts give no data to it. So a lost
host costs every stripe one block at most, of data or of parity, and every host stores losses / (n - losses) extra.

    losses 1    P = d0 + d1 + ...                             XOR: RAID-5 over memory
    losses 2    and Q = d0 + 2 d1 + 4 d2 + ...                over GF(2^8), polynomial 0x11D: RAID-6

    shares = protect(snapshots, losses=1)                     shares[host] is kept by that host
    rebuild(left, left_shares, lengths=lengths, losses=1)     the snapshots of the hosts that `left` lacks

Sources: REFT, arXiv:2310.12670 (RAIM5 over a sharding group); H. P. Anvin, The mathematics of RAID-6.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ...configs.errors import MeshwrightError

POLYNOMIAL = 0x1D  # x^8 = x^4 + x^3 + x^2 + 1
Bytes = np.ndarray  # uint8, one dimension


class TooManyLost(MeshwrightError):
    """More hosts of a group are gone than its parity bears."""


def stripe_hosts(stripe: int, *, hosts: int, losses: int) -> tuple[list[int], list[int]]:
    """(hosts that give data to a stripe, in order; hosts that keep its parity: P, then Q).

    >>> members(1, hosts=4, losses=2)
    ([0, 3], [1, 2])
    """
    keepers = [(stripe + number) % hosts for number in range(losses)]
    return [host for host in range(hosts) if host not in keepers], keepers


def stripes_of(place: int, *, hosts: int, losses: int) -> list[int]:
    """The stripes that the host at `place` gives a block to, in the order of its blocks."""
    return [stripe for stripe in range(hosts) if place in stripe_hosts(stripe, hosts=hosts, losses=losses)[0]]


def check_group(hosts: int, losses: int) -> None:
    """Raise MeshwrightError where a group cannot be protected so."""
    if losses not in (1, 2) or hosts < losses + 1:
        raise MeshwrightError(f"parity: {hosts} hosts cannot bear {losses} losses; 1 or 2, of at least one more host")


def split_blocks(snapshot: Bytes, *, host: int, hosts: int, losses: int, length: int) -> dict[int, Bytes]:
    """Stripe -> the block that a host gives to it; `length` is the longest snapshot's, shorter ones are padded."""
    stripes = [stripe for stripe in range(hosts) if host in stripe_hosts(stripe, hosts=hosts, losses=losses)[0]]
    block = block_length(length, hosts=hosts, losses=losses)
    padded = np.zeros(block * len(stripes), np.uint8)
    padded[: len(snapshot)] = snapshot
    return dict(zip(stripes, padded.reshape(len(stripes), block), strict=True))


def block_length(length: int, *, hosts: int, losses: int) -> int:
    """Bytes of a block: whole words of eight, for the arithmetic."""
    return -(-length // (hosts - losses) // 8) * 8 if length else 8


def compute_parity(snapshots: Sequence[Bytes], *, losses: int) -> list[list[Bytes]]:
    """What each host keeps beside its snapshot: for every parity of the code the one it is keeper of."""
    hosts = len(snapshots)
    check_group(hosts, losses)
    length = max(map(len, snapshots))
    blocks = [
        split_blocks(one, host=host, hosts=hosts, losses=losses, length=length) for host, one in enumerate(snapshots)
    ]
    shares: list[list[Bytes]] = [[] for _ in snapshots]
    for number in range(losses):
        for stripe in range(hosts):
            givers, keepers = stripe_hosts(stripe, hosts=hosts, losses=losses)
            parity = (xor, weighted_sum)[number]([blocks[host][stripe] for host in givers])
            shares[keepers[number]].append(parity)
    return shares


def rebuild_snapshots(
    snapshots: Mapping[int, Bytes], shares: Mapping[int, Sequence[Bytes]], *, lengths: Sequence[int], losses: int
) -> dict[int, Bytes]:
    """The snapshots of the hosts that `snapshots` lacks. `lengths`: bytes of every host's snapshot.

    Raises TooManyLost where it cannot be done. The caller verifies the result by its fingerprints.
    """
    hosts = len(lengths)
    check_group(hosts, losses)
    lost = sorted(set(range(hosts)) - snapshots.keys())
    if len(lost) > losses:
        raise TooManyLost(f"parity: hosts {lost} of {hosts} are lost, and the group bears {losses}")
    shape = {"hosts": hosts, "losses": losses, "length": max(lengths)}
    blocks = {host: split_blocks(one, host=host, **shape) for host, one in snapshots.items()}
    found: dict[int, list[Bytes]] = {host: [] for host in lost}
    for stripe in range(hosts):
        givers, keepers = stripe_hosts(stripe, hosts=hosts, losses=losses)
        # A keeper's first share is P of its own stripe, its second Q of the stripe before it.
        parities = [shares[host][number] if host in snapshots else None for number, host in enumerate(keepers)]
        data = {place: blocks[host][stripe] for place, host in enumerate(givers) if host in snapshots}
        solved = solve_stripe(data, parities, count=len(givers))
        for place, block in solved.items():
            found[givers[place]].append(block)
    return {host: np.concatenate(parts)[: lengths[host]] for host, parts in found.items() if parts}


def solve_stripe(data: Mapping[int, Bytes], parities: Sequence[Bytes | None], *, count: int) -> dict[int, Bytes]:
    """The blocks of a stripe that `data` lacks, by place."""
    missing = [place for place in range(count) if place not in data]
    if not missing:
        return {}
    known = list(data.values())
    first = parities[0]
    if len(missing) == 1 and first is not None:
        return {missing[0]: xor([*known, first])}
    second = parities[1]
    weighed = [scale_block(power_of_two(place), block) for place, block in data.items()]
    if len(missing) == 1:
        return {missing[0]: scale_block(inverse(power_of_two(missing[0])), xor([*weighed, second]))}
    # P + P' = a + b and Q + Q' = g^i a + g^j b, of places i < j, give b = (Q + Q' + g^i (P + P')) / (g^i + g^j).
    (low, high), sums = missing, xor([*known, first])
    other = scale_block(
        inverse(power_of_two(low) ^ power_of_two(high)), xor([*weighed, second, scale_block(power_of_two(low), sums)])
    )
    return {low: xor([sums, other]), high: other}


def xor(blocks: Sequence[Bytes]) -> Bytes:
    """The sum of blocks over GF(2)."""
    result = blocks[0].copy()
    add(result, blocks[1:])
    return result


def weighted_sum(blocks: Sequence[Bytes]) -> Bytes:
    """The sum of 2^i times block i over GF(2^8)."""
    result = blocks[-1].copy()
    add_doubling(result, blocks[-2::-1])
    return result


def add(total: Bytes, blocks: Sequence[Bytes]) -> None:
    """Add `blocks` to `total` over GF(2), in place."""
    words = total.view(np.uint64)
    for block in blocks:
        words ^= np.ascontiguousarray(block).view(np.uint64)


def add_doubling(total: Bytes, blocks: Sequence[Bytes]) -> None:
    """Double `total` over GF(2^8) before each of `blocks` is added to it, in place: Horner's rule, from the last."""
    words = total.view(np.uint64)
    low, high = np.uint64(0x7F7F7F7F7F7F7F7F), np.uint64(0x0101010101010101)
    for block in blocks:
        carry = (words >> np.uint64(7)) & high  # the top bit of every byte
        words[:] = ((words & low) << np.uint64(1)) ^ (carry * np.uint64(POLYNOMIAL))
        words ^= np.ascontiguousarray(block).view(np.uint64)


def multiply(a: int, b: int) -> int:
    """A product in GF(2^8).

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


def power_of_two(exponent: int) -> int:
    """2 to the `exponent` in GF(2^8)."""
    result = 1
    for _ in range(exponent):
        result = multiply(result, 2)
    return result


def inverse(value: int) -> int:
    """1 / `value` in GF(2^8); value^254."""
    result = 1
    for _ in range(254):
        result = multiply(result, value)
    return result


def scale_block(factor: int, block: Bytes) -> Bytes:
    """A block times a constant, by a table of all products."""
    return np.array([multiply(value, factor) for value in range(256)], np.uint8)[block]
