"""Parity: whatever one or two hosts held comes back to the bit, for every choice of them."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.checkpoint.redundancy import parity
from meshwright.checkpoint.redundancy.parity import (
    TooManyLost,
    compute_parity,
    inverse,
    multiply,
    power_of_two,
    rebuild_snapshots,
    stripe_hosts,
)
from meshwright.configs.errors import MeshwrightError


def snapshots(hosts, longest=100, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 256, draw.integers(0, longest + 1), dtype=np.uint8) for _ in range(hosts)]


def without(things, lost):
    return {host: thing for host, thing in enumerate(things) if host not in lost}


@settings(max_examples=60, deadline=None)
@given(hosts=st.integers(2, 7), losses=st.integers(1, 2), longest=st.integers(1, 300), seed=st.integers(0, 99))
def test_any_hosts_within_the_code_come_back(hosts, losses, longest, seed):
    if hosts <= losses:
        return
    saved = snapshots(hosts, longest, seed)
    shares = compute_parity(saved, losses=losses)
    for count in range(1, losses + 1):
        for lost in itertools.combinations(range(hosts), count):
            found = rebuild_snapshots(
                without(saved, lost), without(shares, lost), lengths=list(map(len, saved)), losses=losses
            )
            assert found.keys() == set(lost)
            for host in lost:
                np.testing.assert_array_equal(found[host], saved[host])


def test_one_more_than_the_code_bears_is_refused():
    saved = snapshots(4)
    with pytest.raises(TooManyLost, match=r"hosts \[0, 2\] of 4 are lost, and the group bears 1"):
        rebuild_snapshots(
            without(saved, (0, 2)), without(compute_parity(saved, losses=1), (0, 2)), lengths=[100] * 4, losses=1
        )
    with pytest.raises(MeshwrightError, match="2 hosts cannot bear 2 losses"):
        compute_parity(snapshots(2), losses=2)


@pytest.mark.parametrize(("hosts", "losses"), [(4, 1), (8, 1), (6, 2)])
def test_no_host_keeps_parity_of_its_own_data_and_the_extra_is_small(hosts, losses):
    for stripe in range(hosts):
        givers, keepers = stripe_hosts(stripe, hosts=hosts, losses=losses)
        assert sorted(givers + keepers) == list(range(hosts))
    saved = [np.zeros(8 * 60 * (hosts - losses), np.uint8) for _ in range(hosts)]
    extra = [sum(map(len, share)) / len(saved[0]) for share in compute_parity(saved, losses=losses)]
    assert extra == pytest.approx([losses / (hosts - losses)] * hosts)


def test_a_flipped_bit_of_a_survivor_spoils_the_rebuilt_one():
    """The code has no checksum of its own: what is rebuilt is compared with fingerprints."""
    saved = [np.arange(64, dtype=np.uint8)] * 3
    shares = compute_parity(saved, losses=1)
    left = without(saved, (1,))
    left[0] = left[0] ^ np.uint8(4)
    assert (rebuild_snapshots(left, without(shares, (1,)), lengths=[64] * 3, losses=1)[1] != saved[1]).any()


def test_the_field_is_a_field():
    assert all(multiply(value, inverse(value)) == 1 for value in range(1, 256))
    assert len({power_of_two(exponent) for exponent in range(255)}) == 255  # 2 generates all of it


def test_the_packed_sum_is_the_definition():
    blocks = [np.random.default_rng(number).integers(0, 256, 16, dtype=np.uint8) for number in range(5)]
    wanted = [0] * 16
    for number, block in enumerate(blocks):
        wanted = [one ^ multiply(int(byte), power_of_two(number)) for one, byte in zip(wanted, block, strict=True)]
    assert parity.weighted_sum(blocks).tolist() == wanted
