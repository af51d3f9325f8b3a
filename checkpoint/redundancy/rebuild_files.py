"""Slots of a lost snapshot while they are rebuilt: files beside the slots, taken for what was lost only if they are it.

drafts = drafted(directory, lost); scatter(...); accept(directory, lost, drafts)
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import DamagedCheckpoint
from .host_snapshot import HostSnapshot
from .shm_slots import read_head, read_header, verify_slot


def slot_path(directory: Path, place: int, number: int) -> Path:
    """Where the process in `place` writes its slot 0 or 1."""
    return directory / f"{place}.{number}"


def allocate_drafts(directory: Path, lost: HostSnapshot) -> list[np.ndarray]:
    """Memory for the slots of `lost`, in order of its pieces. Raises OSError where there is no room."""
    result = []
    for piece in lost.slots:
        path = draft_path(directory, piece.process)
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, piece.bytes)
        result.append(np.memmap(path, np.uint8, "r+"))
    return result


def accept_drafts(directory: Path, lost: HostSnapshot, drafts: Sequence[np.ndarray]) -> None:
    """Put what was rebuilt in the place of the older slots. Raises DamagedCheckpoint where it is not what was lost."""
    for piece, content in zip(lost.slots, drafts, strict=True):
        content.flush()
        path = draft_path(directory, piece.process)
        head, header = read_head(path), read_header(path)
        if head is None or header is None or head.raw.hex() != piece.head:
            path.unlink(missing_ok=True)
            raise DamagedCheckpoint(f"snapshot {lost.step} in {directory}: what was rebuilt is not it")
        verify_slot(path, header)
        os.replace(path, older_slot_path(directory, piece.process))


def older_slot_path(directory: Path, place: int) -> Path:
    """The slot of a process without a snapshot, else with the older one."""

    def step(path: Path) -> int:
        head = read_head(path)
        return -1 if head is None else head.step

    return min((slot_path(directory, place, number) for number in (0, 1)), key=step)


def draft_path(directory: Path, place: int) -> Path:
    """Where the slot of a process is rebuilt."""
    return directory / f"{place}.draft"
