"""Parity: the snapshots of one or two lost hosts come back bit for bit, for every choice of hosts."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.checkpoint.redundancy.parity import (
    add_doubling,
    block_length,
    inverse,
    multiply,
    power,
    solve_stripe,
    stripe_hosts,
    stripes_of,
    xor,
)


def random_snapshots(hosts, longest=100, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, random.integers(0, longest + 1), dtype=np.uint8) for _ in range(hosts)]


def without(values, removed):
    return {host: value for host, value in enumerate(values) if host not in removed}


def weighted_sum(blocks):
    total = blocks[-1].copy()
    add_doubling(total, blocks[-2::-1])
    return total


def split_blocks(snapshots, *, lengths, max_lost_hosts):
    """Host -> stripe -> data block, shorter snapshots padded with zeros."""
    hosts = len(lengths)
    length = block_length(max(lengths), hosts=hosts, max_lost_hosts=max_lost_hosts)
    blocks = {}
    for host, snapshot in snapshots.items():
        stripes = stripes_of(host, hosts=hosts, max_lost_hosts=max_lost_hosts)
        padded = np.zeros(length * len(stripes), np.uint8)
        padded[: len(snapshot)] = snapshot
        blocks[host] = dict(zip(stripes, padded.reshape(-1, length), strict=True))
    return blocks


def compute_parity(snapshots, *, max_lost_hosts):
    """Host -> its parity blocks: P of one stripe, Q of another."""
    hosts, parity = len(snapshots), [[] for _ in snapshots]
    blocks = split_blocks(dict(enumerate(snapshots)), lengths=list(map(len, snapshots)), max_lost_hosts=max_lost_hosts)
    for number in range(max_lost_hosts):
        for stripe in range(hosts):
            data_hosts, parity_hosts = stripe_hosts(stripe, hosts=hosts, max_lost_hosts=max_lost_hosts)
            data = [blocks[host][stripe] for host in data_hosts]
            parity[parity_hosts[number]].append((xor, weighted_sum)[number](data))
    return parity


def rebuild(snapshots, parity, *, lengths, max_lost_hosts):
    """Host -> snapshot, for the hosts that `snapshots` and `parity` lack."""
    hosts, rebuilt = len(lengths), {}
    blocks = split_blocks(snapshots, lengths=lengths, max_lost_hosts=max_lost_hosts)
    for stripe in range(hosts):
        data_hosts, parity_hosts = stripe_hosts(stripe, hosts=hosts, max_lost_hosts=max_lost_hosts)
        # The first parity block of a host is P of its own stripe, the second Q of the stripe before it.
        parities = [parity[host][number] if host in parity else None for number, host in enumerate(parity_hosts)]
        data = {number: blocks[host][stripe] for number, host in enumerate(data_hosts) if host in blocks}
        for number, block in solve_stripe(data, parities, count=len(data_hosts)).items():
            rebuilt.setdefault(data_hosts[number], []).append(block)
    return {host: np.concatenate(parts)[: lengths[host]] for host, parts in rebuilt.items()}


@settings(max_examples=60, deadline=None)
@given(hosts=st.integers(2, 7), max_lost_hosts=st.integers(1, 2), longest=st.integers(1, 300), seed=st.integers(0, 99))
def test_any_lost_hosts_that_the_code_tolerates_are_rebuilt(hosts, max_lost_hosts, longest, seed):
    if hosts <= max_lost_hosts:
        return
    saved = random_snapshots(hosts, longest, seed)
    parity, lengths = compute_parity(saved, max_lost_hosts=max_lost_hosts), list(map(len, saved))
    for count in range(1, max_lost_hosts + 1):
        for lost in itertools.combinations(range(hosts), count):
            rebuilt = rebuild(
                without(saved, lost), without(parity, lost), lengths=lengths, max_lost_hosts=max_lost_hosts
            )
            assert rebuilt.keys() == set(lost)
            for host in lost:
                np.testing.assert_array_equal(rebuilt[host], saved[host])


@pytest.mark.parametrize(("hosts", "max_lost_hosts"), [(4, 1), (8, 1), (6, 2)])
def test_no_host_stores_parity_of_its_own_data_and_the_extra_memory_is_small(hosts, max_lost_hosts):
    for stripe in range(hosts):
        data_hosts, parity_hosts = stripe_hosts(stripe, hosts=hosts, max_lost_hosts=max_lost_hosts)
        assert sorted(data_hosts + parity_hosts) == list(range(hosts))
    saved = [np.zeros(8 * 60 * (hosts - max_lost_hosts), np.uint8) for _ in range(hosts)]
    extra = [sum(map(len, blocks)) / len(saved[0]) for blocks in compute_parity(saved, max_lost_hosts=max_lost_hosts)]
    assert extra == pytest.approx([max_lost_hosts / (hosts - max_lost_hosts)] * hosts)


def test_a_flipped_bit_of_a_surviving_snapshot_damages_the_rebuilt_one():
    """The code has no checksum of its own, so the caller compares what is rebuilt with its hashes."""
    saved = [np.arange(64, dtype=np.uint8)] * 3
    parity = compute_parity(saved, max_lost_hosts=1)
    surviving = without(saved, (1,))
    surviving[0] = surviving[0] ^ np.uint8(4)
    assert (rebuild(surviving, without(parity, (1,)), lengths=[64] * 3, max_lost_hosts=1)[1] != saved[1]).any()


def test_multiplication_is_that_of_a_field_generated_by_two():
    assert all(multiply(value, inverse(value)) == 1 for value in range(1, 256))
    assert len({power(2, exponent) for exponent in range(255)}) == 255


def test_doubling_packed_words_equals_the_definition_byte_by_byte():
    blocks = [np.random.default_rng(number).integers(0, 256, 16, dtype=np.uint8) for number in range(5)]
    expected = [0] * 16
    for number, block in enumerate(blocks):
        products = [multiply(int(byte), power(2, number)) for byte in block]
        expected = [total ^ product for total, product in zip(expected, products, strict=True)]
    assert weighted_sum(blocks).tolist() == expected
