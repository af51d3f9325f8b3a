"""Snapshots in the memory of the host: slots in /dev/shm, which outlive the process that wrote them.

Each process keeps two slots (`slots.py`), so that one is whole while the other is written. A snapshot is used where the
slots on this host together hold everything this process needs: its own where the mesh is the same, the others' of the
host where it is not. A host that is lost takes its snapshots along; what the keepers (`keeper.py`) rebuild of them from
parity lies where they lay.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..parallel.state import TrainState
from .errors import DamagedCheckpoint
from .fingerprints import Box, box_of, covers, extract_box, local_shards
from .redundancy import agent_files
from .redundancy.shm_slots import Header, SlotPool, block_offsets, header_offset, read_header, verify_slot, write_slot
from .storage import flatten_paths, leaf_paths, saved_tree

HEADER = 2**20  # bytes set aside for the header, which is not known before the first snapshot

Parts = dict[str, dict[Box, np.ndarray]]  # path -> box -> elements


class MemoryStore:
    """The slots of one run on this host. `directory` is in a file system that lives in memory.

    `layout` names the run's layout: snapshots are kept as the run holds its arrays, and another layout's are not
    offered. `place`: the number in the names of its files, which the next process in this place finds again; None: this
    process's.
    """

    def __init__(self, directory: Path, *, layout: str = "", launch_slot: int | None = None) -> None:
        self.directory, self._layout = directory, layout
        self._place = jax.process_index() if launch_slot is None else launch_slot
        self._pool = SlotPool()

    def reserve(self, state: TrainState) -> None:
        """Touch the memory of both slots. Raises OSError where there is no room."""
        total = header_offset([view.nbytes for _, _, _, view in _shards(state)]) + HEADER
        for slot in (0, 1):
            self._pool.map_slot(self._path(slot), total)

    def save(self, state: TrainState, *, step: int, data: Mapping[str, Any], keep_step: int | None = None) -> int:
        """Snapshot this process's shards of `state`; bytes written. Returns when the arrays may change.

        Overwrites the slot that does not hold step `keep`; None: the older one. Raises OSError where there is no room.
        """
        arrays: dict[str, Any] = {}
        views = []
        for path, array, box, view in _shards(state):
            entry = arrays.setdefault(path, {"shape": list(array.shape), "dtype": str(array.dtype), "parts": []})
            entry["parts"].append([box, len(views)])
            views.append(view)
        sizes = [view.nbytes for view in views]
        header = {"step": step, "layout": self._layout, "data": dict(data), "arrays": arrays}
        with write_slot(self._pool, self._target(keep_step), sizes, header) as slot:
            for number, view in enumerate(views):
                slot.write(number, view)
        return sum(sizes)

    @property
    def newest_step(self) -> int:
        """The newest step of which this process has a whole snapshot; -1: none."""
        return max((header["step"] for header in map(read_header, map(self._path, (0, 1))) if header), default=-1)

    @property
    def protected(self) -> agent_files.Protected:
        """What the keepers protect."""
        return agent_files.read_protected(self.directory)

    @property
    def recovery(self) -> agent_files.Recovery | None:
        """What the keepers found and rebuilt before this sitting; None without keepers."""
        return agent_files.read_recovery(self.directory)

    def usable_steps(self, shardings: Mapping[str, Any], shapes: Mapping[str, Any]) -> list[int]:
        """Steps of which this host's slots hold all that this process needs, oldest first; not verified yet."""
        found = {header["step"] for _, header in self._headers()}
        return sorted(step for step in found if self._lacks(step, shardings, shapes) is None)

    def why_unusable(self, step: int, shardings: Mapping[str, Any], shapes: Mapping[str, Any]) -> str:
        """Why a snapshot here that is newer than `step` cannot be used; empty where there is none."""
        newer = max((header["step"] for _, header in self._headers() if header["step"] > step), default=step)
        lack = self._lacks(newer, shardings, shapes) if newer > step else None
        return f"snapshot {newer} on this host is of another mesh or not whole, it lacks {lack}" if lack else ""

    def restore(self, step: int, *, shapes: TrainState, shardings: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state of `step` placed by `shardings`, and what was saved beside it.

        Raises DamagedCheckpoint where a slot is not what was written, or something is missing.
        """
        wanted, placed = flatten_paths(saved_tree(shapes)), flatten_paths(saved_tree(shardings))
        if lack := self._lacks(step, placed, wanted):
            raise DamagedCheckpoint(f"snapshot {step} in {self.directory}: {lack} is not there")
        parts: Parts = {}
        data: dict[str, Any] = {}
        for path, header in self._headers():
            if header["step"] == step:
                data = header["data"]
                _read(path, header, parts)
        arrays = {
            name: jax.make_array_from_callback(
                like.shape, placed[name], lambda index, name=name, like=like: _shard(parts[name], index, like)
            )
            for name, like in wanted.items()
        }
        leaves = [arrays.get(name) for name in leaf_paths(shapes)]
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves), data

    def delete_after(self, *, beyond: int) -> None:
        """Delete this host's snapshots of later steps: the run goes on from `beyond`, on a time line of its own.

        Those of places that nobody fills now, too: what they hold of a later step would be mixed with the new one.
        """
        for path, header in self._headers():
            if header["step"] > beyond:
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete everything: the run has ended, or another one begins under its name."""
        self._pool.close()
        if self.directory.is_dir():
            for path in self.directory.glob("[0-9]*.[01]"):
                path.unlink(missing_ok=True)
        agent_files.remove_leftovers(self.directory)

    def _path(self, slot: int) -> Path:
        return self.directory / f"{self._place}.{slot}"

    def _headers(self) -> list[tuple[Path, Header]]:
        """The slots that say they are whole, with their headers, which are."""
        files = sorted(self.directory.glob("[0-9]*.[01]")) if self.directory.is_dir() else []
        found = [(path, header) for path in files if (header := read_header(path)) is not None]
        return [(path, header) for path, header in found if header["layout"] == self._layout]

    def _target(self, keep: int | None) -> Path:
        """The slot to write: not that of step `keep`, else one without a snapshot, else the older."""
        known = {slot: header["step"] for slot in (0, 1) if (header := read_header(self._path(slot))) is not None}
        return self._path(min((0, 1), key=lambda slot: (known.get(slot, -2) == keep, known.get(slot, -1))))

    def _lacks(self, step: int, shardings: Mapping[str, Any], shapes: Mapping[str, Any]) -> str | None:
        """The first array of which the slots of `step` do not hold all that this process needs."""
        boxes: dict[str, set[Box]] = {}
        kinds: dict[str, tuple] = {}
        for _, header in self._headers():
            if header["step"] == step:
                for path, entry in header["arrays"].items():
                    boxes.setdefault(path, set()).update(_box(box) for box, _ in entry["parts"])
                    kinds[path] = (tuple(entry["shape"]), entry["dtype"])
        for path, like in shapes.items():
            if kinds.get(path) != (tuple(like.shape), str(like.dtype)):
                return path
            needed = shardings[path].addressable_devices_indices_map(tuple(like.shape)).values()
            if not all(covers(boxes[path], box_of(index, like.shape)) for index in needed):
                return path
        return None


def _shards(state: TrainState) -> list[tuple[str, Any, Box, np.ndarray]]:
    """(path, array, box, elements) of this process's distinct shards."""
    return [
        (path, array, box, view)
        for path, array in flatten_paths(saved_tree(state)).items()
        for box, view in local_shards(array)
    ]


def _read(path: Path, header: Header, parts: Parts) -> None:
    """Add the parts of a slot. Raises DamagedCheckpoint where it is not what was written."""
    content = verify_slot(path, header)
    places = block_offsets([size for _, size, _ in header["blocks"]])
    for name, entry in header["arrays"].items():
        dtype = jax.numpy.dtype(entry["dtype"])
        for box, number in entry["parts"]:
            shape = [stop - start for start, stop in box]
            size = header["blocks"][number][1]
            elements = content[places[number] : places[number] + size].view(dtype).reshape(shape)
            parts.setdefault(name, {})[_box(box)] = elements


def _box(edges: Any) -> Box:
    """A box from JSON."""
    return tuple((start, stop) for start, stop in edges)


def _shard(parts: Mapping[Box, np.ndarray], index: Any, like: Any) -> np.ndarray:
    """A device's elements, out of the parts of an array."""
    return extract_box(list(parts.items()), box_of(index, like.shape), like.dtype)


def open_memory_store(run: Path, *, layout: str, host: int = 0, launch_slot: int | None = None) -> MemoryStore:
    """The slots of the run in directory `run` on host number `host`, those of `place` its own."""
    return MemoryStore(agent_files.memory_directory(run, host=host), layout=layout, launch_slot=launch_slot)
