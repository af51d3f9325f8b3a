"""A host's snapshot as a string of bytes: the slots its processes wrote at one step, one after the other. JAX-free."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from .parity_groups import Holding


@dataclass(frozen=True)
class ProcessSlot:
    """One process's slot in a host's snapshot."""

    process: int
    bytes: int
    head: str  # hexadecimal

    @property
    def padded(self) -> int:
        """Bytes in the string: whole words of eight."""
        return -(-self.bytes // 8) * 8


@dataclass(frozen=True)
class HostSnapshot:
    """A host's snapshot of a step."""

    step: int
    slots: tuple[ProcessSlot, ...]

    @property
    def seal(self) -> str:
        """Tells it from any other snapshot."""
        return xxhash.xxh3_64_hexdigest("".join(piece.head for piece in self.slots).encode())

    @property
    def bytes(self) -> int:
        """Of the string."""
        return sum(piece.padded for piece in self.slots)

    def to_json(self) -> list[list[Any]]:
        """As JSON."""
        return [[piece.process, piece.bytes, piece.head] for piece in self.slots]


def snapshot_from_json(step: int, pieces: Sequence[Sequence[Any]]) -> HostSnapshot:
    """The inverse of `Snapshot.public`."""
    return HostSnapshot(step, tuple(ProcessSlot(*piece) for piece in pieces))


def holding_from_json(info: Mapping[str, Any]) -> Holding:
    """What a keeper told, as the planner reads it."""
    return Holding(
        {int(step): snapshot_from_json(int(step), pieces).seal for step, pieces in info["held"].items()},
        {int(step): {int(host): seal for host, seal in made.items()} for step, made in info["shares"].items()},
    )


def scatter_to_slots(content: np.ndarray, drafts: Sequence[np.ndarray], lost: HostSnapshot, *, start: int) -> None:
    """Write bytes of a host's snapshot, from byte `start` of the string on, to the slots they belong to."""
    offset = 0
    for piece, draft in zip(lost.slots, drafts, strict=True):
        low, high = max(start, offset), min(start + len(content), offset + piece.bytes)
        if low < high:
            draft[low - offset : high - offset] = content[low - start : high - start]
        offset += piece.padded
