"""Rebuild buffers: files beside the slots in which a lost snapshot is rebuilt, verified before they replace slots.

buffers = allocate_rebuild_buffers(directory, snapshot)
scatter_to_slots(content, buffers, snapshot, start=0)
accept_rebuild_buffers(directory, snapshot, buffers)
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import DamagedCheckpoint
from .host_snapshot import HostSnapshot
from .shm_slots import read_header, read_preamble, slot_paths, slot_step, verify_slot


def allocate_rebuild_buffers(directory: Path, snapshot: HostSnapshot) -> list[np.ndarray]:
    """Return writable memory for each slot of `snapshot`, in order. Raises OSError if there is no space."""
    result = []
    for slot in snapshot.slots:
        path = rebuild_buffer_path(directory, slot.launch_slot)
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, slot.bytes)
        result.append(np.memmap(path, np.uint8, "r+"))
    return result


def accept_rebuild_buffers(directory: Path, snapshot: HostSnapshot, buffers: Sequence[np.ndarray]) -> None:
    """Replace the older slot of each process by its buffer.

    Raises DamagedCheckpoint if a buffer is not what was lost.
    """
    for slot, content in zip(snapshot.slots, buffers, strict=True):
        content.flush()
        path = rebuild_buffer_path(directory, slot.launch_slot)
        preamble, header = read_preamble(path), read_header(path)
        if preamble is None or header is None or preamble.raw.hex() != slot.preamble:
            path.unlink(missing_ok=True)
            raise DamagedCheckpoint(
                f"snapshot {snapshot.step} in {directory}: what was rebuilt for launch slot {slot.launch_slot} differs "
                "from what was lost"
            )
        verify_slot(path, header)
        os.replace(path, min(slot_paths(directory, slot.launch_slot), key=slot_step))


def rebuild_buffer_path(directory: Path, launch_slot: int) -> Path:
    """Return the path of the buffer for the process in a launch slot."""
    return directory / f"{launch_slot}.draft"
