"""Seconds of one collective over the links of a hardware target, if nothing else uses them.

    link_seconds("all-gather", 2**20, groups, devices=mesh_devices, topology=parse_topology("v5p:4x4x4"))

The model: the members of a group lie along some axes of a torus, each a ring if its ends are linked, else a line; all
these rings work at once, in both directions. Devices at a switch have one link of the given rate. Slices, and hosts of
GPUs, have their share of the network. Latency is left out: a collective of few bytes is estimated as free.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jax

from ..configs.hardware_targets import Links, Topology

# Group size n -> bytes that a device receives for each byte of the array that the members have together.
RECEIVED_SHARE: dict[str, Callable[[int], float]] = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n / 4,  # on a ring, where an average message passes n / 4 links both ways
    "ragged-all-to-all": lambda n: (n - 1) / n / 4,
    "collective-broadcast": lambda n: 1.0,
    "collective-permute": lambda n: 1.0,
}


@dataclass(frozen=True)
class GroupRate:
    """Bytes per second into a device from its group."""

    neighbour: float  # from one other device
    ring: float  # from all others together, when each passes on what it has


def link_seconds(
    kind: str, size: float, groups: Iterable[Sequence[int]], *, devices: Sequence[jax.Device], topology: Topology
) -> float | None:
    """Seconds of a collective of `kind`; None if the rate of the links that it uses is unknown.

    `size`: bytes of the array that the members of a group have together; of a permute, those that a device sends.
    `groups`: members, as places in `devices`.
    """
    members = [[devices[place] for place in group] for group in groups]
    count = max(map(len, members), default=1)
    if count == 1 or size == 0:
        return 0.0
    rates = [group_rate(group, topology) for group in members if len(group) > 1]
    known = [rate for rate in rates if rate is not None]
    if len(known) < len(rates):
        return None
    received = size * RECEIVED_SHARE[kind](count)
    return max(received / (rate.neighbour if kind == "collective-permute" else rate.ring) for rate in known)


def group_rate(group: Sequence[jax.Device], topology: Topology) -> GroupRate | None:
    """The rate of the links that `group` communicates over; None if the target's file does not give it."""
    target, links = topology.target, topology.target.links
    if len({getattr(device, "slice_index", 0) for device in group}) > 1:
        return shared_rate(target.network_bandwidth)
    if links is None:
        return None
    if links.topology == "torus":
        return torus_rate(group, links, topology)
    if len({device.process_index for device in group}) > 1:
        return shared_rate(target.network_bandwidth)
    return shared_rate(links.bandwidth)


def shared_rate(bandwidth: float | None) -> GroupRate | None:
    """The rate of devices that have one link of `bandwidth` to all others."""
    return None if bandwidth is None else GroupRate(bandwidth, bandwidth)


def torus_rate(group: Sequence[jax.Device], links: Links, topology: Topology) -> GroupRate | None:
    """The rate of a group in a torus: its rings and lines work at once. The devices of a chip share its links."""
    coordinates = list(zip(*(device.coords[: links.axes] for device in group), strict=True))  # [axis][member]
    extents = [len(set(places)) for places in coordinates]
    if all(extent == 1 for extent in extents):  # the devices of one chip
        return shared_rate(None if links.chip_bandwidth is None else links.chip_bandwidth)
    per_chip = len({device.core_on_chip for device in group})
    ring = 0.0
    for extent, size in zip(extents, topology.shape, strict=True):
        if extent > 1:
            wraps = extent == size and size >= links.wraps_from and size % links.wraps_from == 0
            ring += links.bandwidth * (2 if wraps else 1)
    return GroupRate(links.bandwidth / per_chip, ring / per_chip)
