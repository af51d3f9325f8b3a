"""Snapshots in host memory: slots in /dev/shm, which outlive the process that wrote them.

Each process has two slots (`redundancy/shm_slots.py`), so that one is complete while the other is written. A snapshot
can be restored if the slots on this host together hold everything that this process needs; after a change of the mesh
these may be slots of other processes. The snapshots of a lost host are lost with it, unless the snapshot agents
(`redundancy/snapshot_agent.py`) rebuild them from parity, in the same files.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..parallel.state import TrainState
from .errors import DamagedCheckpoint
from .fingerprints import Box, box_of, covers, extract_box, local_shards
from .redundancy import agent_files, shm_slots
from .redundancy.shm_slots import Header, SlotPool, read_header, slot_files, verify_slot, write_slot
from .storage import flatten_paths, saved_tree

HEADER_RESERVE = 2**20  # bytes reserved for the header, whose size is not known before the first snapshot

Parts = dict[str, dict[Box, np.ndarray]]  # path -> box -> elements


class MemoryStore:
    """The slots of one run on this host, in `directory`, which is in a file system that lives in memory.

    `layout`: name of the run layout. Snapshots hold the arrays as the run does, so those of other layouts are ignored.
    `launch_slot` is in the names of the files of this process, so that the next process in the launch slot finds them;
    None: the number of the process.
    """

    def __init__(self, directory: Path, *, layout: str = "", launch_slot: int | None = None) -> None:
        self.directory, self._layout = directory, layout
        self._paths = shm_slots.slot_paths(directory, jax.process_index() if launch_slot is None else launch_slot)
        self._pool = SlotPool()

    def reserve(self, state: TrainState) -> None:
        """Map and touch the memory of both slots. Raises OSError if there is no space."""
        size = shm_slots.header_offset([view.nbytes for _, _, _, view in _shards(state)]) + HEADER_RESERVE
        for path in self._paths:
            self._pool.map_slot(path, size)

    def save(self, state: TrainState, *, step: int, data: Mapping[str, Any], keep_step: int | None = None) -> int:
        """Write this process's shards of `state` to a slot, and return the bytes written. Then the arrays may change.

        The slot with step `keep_step` is not overwritten; None: the older slot is overwritten. Raises OSError if there
        is no space.
        """
        arrays: dict[str, Any] = {}
        views = []
        for path, array, box, view in _shards(state):
            entry = arrays.setdefault(path, {"shape": list(array.shape), "dtype": str(array.dtype), "parts": []})
            entry["parts"].append([box, len(views)])
            views.append(view)
        sizes = [view.nbytes for view in views]
        header = {"step": step, "layout": self._layout, "data": dict(data), "arrays": arrays}
        with write_slot(self._pool, self._slot_to_write(keep_step), sizes, header) as writer:
            for number, view in enumerate(views):
                writer.write(number, view)
        return sum(sizes)

    @property
    def newest_step(self) -> int:
        """The newest step of which this process has a complete slot; -1: none."""
        return max((header["step"] for header in map(read_header, self._paths) if header), default=-1)

    @property
    def protected(self) -> agent_files.ProtectedStep:
        """What the snapshot agents protect by parity."""
        return agent_files.read_protected(self.directory)

    @property
    def recovery(self) -> agent_files.Recovery | None:
        """What the snapshot agents recovered before this session; None without agents."""
        return agent_files.read_recovery(self.directory)

    def usable_steps(self, shardings: Mapping[str, Any], shapes: Mapping[str, Any]) -> list[int]:
        """Return the steps that this process can restore from slots on this host, oldest first, unverified."""
        steps = {header["step"] for _, header in self._headers()}
        return sorted(step for step in steps if self._missing_array(step, shardings, shapes) is None)

    def why_unusable(self, step: int, shardings: Mapping[str, Any], shapes: Mapping[str, Any]) -> str:
        """Say why the newest snapshot after `step` on this host cannot be restored; empty if there is none."""
        newest = max((header["step"] for _, header in self._headers()), default=step)
        missing = self._missing_array(newest, shardings, shapes) if newest > step else None
        return (
            f"snapshot {newest} on this host lacks parts of {missing}: another mesh, or incomplete" if missing else ""
        )

    def restore(self, step: int, *, shapes: TrainState, shardings: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Return the state of `step` on `shardings`, and the data that was saved with it.

        Raises DamagedCheckpoint if a slot is damaged or an array is missing.
        """
        shape_of, sharding_of = flatten_paths(saved_tree(shapes)), flatten_paths(saved_tree(shardings))
        if missing := self._missing_array(step, sharding_of, shape_of):
            raise DamagedCheckpoint(f"snapshot {step} in {self.directory}: parts of {missing} are missing")
        parts: Parts = {}
        data: dict[str, Any] = {}
        for path, header in self._headers():
            if header["step"] == step:
                data = header["data"]
                _read(path, header, parts)

        def load(name: str, like: Any) -> jax.Array:
            elements = lambda index: extract_box(list(parts[name].items()), box_of(index, like.shape), like.dtype)
            return jax.make_array_from_callback(like.shape, sharding_of[name], elements)

        leaves = [load(name, shape_of[name]) if name in shape_of else None for name in flatten_paths(shapes)]
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves), data

    def delete_after(self, *, beyond: int) -> None:
        """Delete the snapshots of later steps than `beyond` on this host: the run goes on from there.

        Slots of launch slots without a process are deleted too, or they would be mixed with new snapshots of that step.
        """
        for path, header in self._headers():
            if header["step"] > beyond:
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete everything: the run has ended, or a new run starts under its name."""
        self._pool.close()
        for path in slot_files(self.directory):
            path.unlink(missing_ok=True)
        agent_files.remove_leftovers(self.directory)

    def _headers(self) -> list[tuple[Path, Header]]:
        """Return (path, header) of the complete slots of this layout on this host."""
        headers = [(path, read_header(path)) for path in slot_files(self.directory)]
        return [(path, header) for path, header in headers if header is not None and header["layout"] == self._layout]

    def _slot_to_write(self, keep_step: int | None) -> Path:
        """Return the slot to overwrite: not that of `keep_step`; else an empty one; else the older."""

        def priority(path: Path) -> tuple[bool, int]:
            header = read_header(path)
            return (False, -1) if header is None else (header["step"] == keep_step, header["step"])

        return min(self._paths, key=priority)

    def _missing_array(self, step: int, shardings: Mapping[str, Any], shapes: Mapping[str, Any]) -> str | None:
        """Return an array of which this process needs a part that the slots of `step` lack; None if there is none."""
        boxes: dict[str, set[Box]] = {}
        kinds: dict[str, tuple] = {}
        for _, header in self._headers():
            if header["step"] == step:
                for path, entry in header["arrays"].items():
                    boxes.setdefault(path, set()).update(tuple(map(tuple, box)) for box, _ in entry["parts"])
                    kinds[path] = (tuple(entry["shape"]), entry["dtype"])
        for path, like in shapes.items():
            if kinds.get(path) != (tuple(like.shape), str(like.dtype)):
                return path
            needed = shardings[path].addressable_devices_indices_map(tuple(like.shape)).values()
            if not all(covers(boxes[path], box_of(index, like.shape)) for index in needed):
                return path
        return None


def _shards(state: TrainState) -> list[tuple[str, Any, Box, np.ndarray]]:
    """Return (path, array, box, elements) of the distinct shards of this process."""
    return [
        (path, array, box, view)
        for path, array in flatten_paths(saved_tree(state)).items()
        for box, view in local_shards(array)
    ]


def _read(path: Path, header: Header, parts: Parts) -> None:
    """Verify a slot and add its arrays to `parts`. Raises DamagedCheckpoint if it is damaged."""
    content = verify_slot(path, header)
    for name, entry in header["arrays"].items():
        dtype = jax.numpy.dtype(entry["dtype"])
        for box, number in entry["parts"]:
            shape = [stop - start for start, stop in box]
            offset, size, _ = header["blocks"][number]
            elements = content[offset : offset + size].view(dtype).reshape(shape)
            parts.setdefault(name, {})[tuple(map(tuple, box))] = elements


def open_memory_store(run: Path, *, layout: str, host: int = 0, launch_slot: int | None = None) -> MemoryStore:
    """Return the store of the run in directory `run` on host number `host`, for the process in `launch_slot`."""
    return MemoryStore(agent_files.memory_directory(run, host=host), layout=layout, launch_slot=launch_slot)
