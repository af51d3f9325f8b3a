"""A host's snapshot as one string of bytes: the slots that its processes wrote at one step, concatenated. JAX-free."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from .parity_groups import HeldSnapshots


@dataclass(frozen=True)
class ProcessSlot:
    """The slot of one process in a host's snapshot."""

    launch_slot: int
    bytes: int
    preamble: str  # the preamble of the slot, hexadecimal

    @property
    def padded(self) -> int:
        """Number of bytes in the string: a multiple of 8."""
        return -(-self.bytes // 8) * 8


@dataclass(frozen=True)
class HostSnapshot:
    """A host's snapshot of a step."""

    step: int
    slots: tuple[ProcessSlot, ...]

    @property
    def seal(self) -> str:
        """xxh3 of the preambles of the slots. They contain hashes of all else, so it identifies the snapshot."""
        return xxhash.xxh3_64_hexdigest("".join(slot.preamble for slot in self.slots).encode())

    @property
    def bytes(self) -> int:
        """Length of the string."""
        return sum(slot.padded for slot in self.slots)

    def to_json(self) -> list[list[Any]]:
        """Return [launch slot, bytes, preamble] of every slot."""
        return [[slot.launch_slot, slot.bytes, slot.preamble] for slot in self.slots]


def snapshot_from_json(step: int, slots: Sequence[Sequence[Any]]) -> HostSnapshot:
    """Invert `HostSnapshot.to_json`."""
    return HostSnapshot(step, tuple(ProcessSlot(*slot) for slot in slots))


def held_snapshots_from_json(status: Mapping[str, Any]) -> HeldSnapshots:
    """Convert the status that a snapshot agent publishes to what `parity_groups` reads."""
    return HeldSnapshots(
        {int(step): snapshot_from_json(int(step), slots).seal for step, slots in status["snapshots"].items()},
        {int(step): {int(host): seal for host, seal in seals.items()} for step, seals in status["parity"].items()},
    )


def scatter_to_slots(content: np.ndarray, buffers: Sequence[np.ndarray], snapshot: HostSnapshot, *, start: int) -> None:
    """Copy `content`, the bytes of the snapshot's string from byte `start` on, to the buffers of its slots."""
    offset = 0
    for slot, buffer in zip(snapshot.slots, buffers, strict=True):
        low, high = max(start, offset), min(start + len(content), offset + slot.bytes)
        if low < high:
            buffer[low - offset : high - offset] = content[low - start : high - start]
        offset += slot.padded
