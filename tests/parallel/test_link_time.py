"""Seconds of collectives by the links they use, against the times that the links of a ring need."""

from types import SimpleNamespace

import pytest

from meshwright.configs.hardware_targets import parse_topology
from meshwright.parallel.link_time import link_seconds

GB = 1e9


def torus(topology, cores=1):
    """Devices as libtpu describes them, the last axis of the torus first."""
    shape = parse_topology(topology).shape
    places = [[]]
    for size in shape:
        places = [[*place, number] for place in places for number in range(size)]
    return [
        SimpleNamespace(coords=(*place, *[0] * (3 - len(shape))), core_on_chip=core, slice_index=0, process_index=0)
        for place in places
        for core in range(cores)
    ]


def seconds(topology, kind, size, groups, cores=1):
    devices = torus(topology, cores)
    return link_seconds(kind, size, groups, devices=devices, topology=parse_topology(topology))


def test_a_ring_of_four_passes_three_quarters_both_ways():
    """v5p: 90 GB/s a link, and an axis of 4 is linked at its ends."""
    group = [0, 16, 32, 48]  # along the first axis of 4x4x4
    assert seconds("v5p:4x4x4", "all-gather", 180 * GB, [group]) == pytest.approx(0.75)
    assert seconds("v5p:4x4x4", "all-reduce", 180 * GB, [group]) == pytest.approx(1.5)
    assert seconds("v5p:4x4x4", "reduce-scatter", 180 * GB, [group]) == pytest.approx(0.75)


def test_a_line_has_half_the_rate_of_a_ring():
    group = [0, 4]  # along the first axis of 2x2x1 ... of v5p, too short to be linked at its ends
    assert seconds("v5p:2x2x2", "all-gather", 90 * GB, [group]) == pytest.approx(0.5)
    assert seconds("v6e:4x4", "all-gather", 90 * GB, [[0, 4, 8, 12]]) == pytest.approx(0.75)  # rings from 16


def test_axes_work_at_once():
    everyone = [list(range(64))]
    assert seconds("v5p:4x4x4", "all-gather", 540 * GB, everyone) == pytest.approx(63 / 64)


def test_a_permute_takes_one_link():
    assert seconds("v5p:4x4x4", "collective-permute", 90 * GB, [[0, 16], [16, 32]]) == pytest.approx(1)


def test_the_devices_of_a_chip_share_its_links_and_their_own_is_unknown():
    two_chips = [0, 1, 2, 3]  # of 2x2x1, two devices each, along the second axis
    alone = seconds("v7x:2x2x1", "all-gather", 90 * GB, [[0, 2]], cores=2)
    assert alone == pytest.approx(0.5)
    assert seconds("v7x:2x2x1", "all-gather", 90 * GB, [two_chips], cores=2) == pytest.approx(1.5)
    assert seconds("v7x:2x2x1", "all-gather", 90 * GB, [[0, 1]], cores=2) is None


def test_slices_have_their_share_of_the_network():
    devices = torus("v5e:4x4") + torus("v5e:4x4")
    for device in devices[16:]:
        device.slice_index = 1
    topology = parse_topology("2*v5e:4x4")
    needed = link_seconds("all-reduce", 3.125 * GB, [[0, 16]], devices=devices, topology=topology)
    assert needed == pytest.approx(1)


def test_gpus_of_a_host_have_a_switch_and_hosts_an_unknown_network():
    devices = [SimpleNamespace(process_index=number // 8) for number in range(16)]
    topology = parse_topology("h100x16")
    within = link_seconds("all-gather", 450 * GB, [list(range(8))], devices=devices, topology=topology)
    assert within == pytest.approx(7 / 8)
    assert link_seconds("all-gather", GB, [list(range(16))], devices=devices, topology=topology) is None


def test_a_group_of_one_communicates_nothing():
    assert seconds("v5p:4x4x4", "all-reduce", GB, [[number] for number in range(64)]) == 0
