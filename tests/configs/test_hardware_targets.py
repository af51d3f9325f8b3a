"""The files of hardware targets are whole, and their names are read or refused."""

import pytest

from meshwright.configs.errors import UserError
from meshwright.configs.hardware_targets import find_target, hardware_targets, parse_topology

TARGETS = hardware_targets()
NUMBERS = (
    "memory_bytes",
    "memory_bandwidth",
    "peak_flops",
    "clock_hz",
    "links",
    "kernels",
    "host_bandwidth",
    "network_bandwidth",
)


@pytest.mark.parametrize("name", TARGETS)
def test_each_number_has_its_source_and_no_source_is_left_over(name):
    target = TARGETS[name]
    assert set(target.sources) == {number for number in NUMBERS if getattr(target, number)}
    assert "bfloat16" in target.peak_flops or target.platform == "cpu"


def test_a_device_kind_is_matched_whole():
    """`TPU v5` is a v5p, and is contained in the name of a v5e."""
    assert find_target("TPU v5").name == "v5p" and find_target("TPU v5 lite").name == "v5e"
    assert find_target("NVIDIA H100 PCIe") is None  # slower than the H100 of the file
    kinds = [kind for target in TARGETS.values() for kind in target.kinds]
    assert len(kinds) == len(set(kinds))


@pytest.mark.parametrize(
    ("text", "devices", "shape"),
    [
        ("v5p:4x4x4", 64, (4, 4, 4)),
        ("v7x:2x2x1", 8, (2, 2, 1)),
        ("2*v6e:4x4", 32, (4, 4)),
        ("h100x8", 8, (1, 8)),
        ("h200", 1, (1, 1)),
        ("h100x16", 16, (2, 8)),
        ("a100-40gbx4", 4, (1, 4)),
        ("cpux8", 8, (8, 1)),
    ],
)
def test_a_topology_says_how_many_devices_it_has(text, devices, shape):
    topology = parse_topology(text)
    assert (topology.devices, topology.shape) == (devices, shape)
    assert parse_topology(str(topology)) == topology


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5q:4x4x4", "v5p"),
        ("v5p:4x4", "2 axes"),
        ("v6e", "v6e:4x4"),
        ("v6ex16", "16 devices"),
        ("h100:1x8", "h100x8"),
        ("h100x12", "a host has 8"),
        ("v5p:0x2x2", "v5p:4x4x4"),
        ("", "is not a target"),
    ],
)
def test_what_is_no_target_is_refused_with_one_that_is(text, message):
    with pytest.raises(UserError, match="--target: ") as error:
        parse_topology(text)
    assert message in str(error.value)
