"""Snapshots in the memory of the host: files in /dev/shm, which outlive the process that wrote them.

Each process keeps two slots, so that one is whole while the other is written:

    0 .. 64     magic, offset and length of the header, xxh3 of header and of payload, state
    64 ..       the bytes of the process's distinct shards, then the header: step, data, where each part lies

A slot is emptied first, then filled, and declared whole last. What is read is compared with the fingerprints. A
snapshot is used where the slots on this host together hold everything this process needs: its own where the mesh is the
same, the others' of the host where it is not. A host that is lost takes its snapshots along.
"""

import contextlib
import json
import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xxhash

from ..parallel.state import TrainState
from .fingerprints import Box, box_of, covered, cut, held
from .manifest import DamagedCheckpoint
from .storage import by_path, names, tree

MAGIC, WHOLE, EMPTY = b"MESHSLOT", 2, 0
HEAD = struct.Struct("<8sQQQQQ")  # magic, header's offset, its length, xxh3 of header, of payload, state
START = 64

Parts = dict[str, dict[Box, np.ndarray]]  # path -> box -> elements


class Memory:
    """The slots of one run on this host. `directory` is in a file system that lives in memory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open: dict[Path, mmap.mmap] = {}

    def save(self, state: TrainState, *, step: int, data: Mapping[str, Any]) -> int:
        """Snapshot this process's shards of `state`; bytes written. Returns when the arrays may change.

        Raises OSError where there is no room.
        """
        arrays, views, offset = {}, [], START
        for path, array in by_path(tree(state)).items():
            parts = []
            for box, view in held(array):
                parts.append([box, offset, view.nbytes])
                views.append((offset, view))
                offset += -(-view.nbytes // 64) * 64
            arrays[path] = {"shape": list(array.shape), "dtype": str(array.dtype), "parts": parts}
        header = json.dumps({"step": step, "data": dict(data), "arrays": arrays}).encode()
        slot = self._slot(self._directory / f"{jax.process_index()}.{self._older()}", offset + len(header))
        slot[: HEAD.size] = HEAD.pack(MAGIC, 0, 0, 0, 0, EMPTY)
        for place, view in views:
            target = np.frombuffer(slot, view.dtype, view.size, place).reshape(view.shape)
            np.copyto(target, view)
        slot[offset : offset + len(header)] = header
        seen = hashed(memoryview(slot)[START:offset])
        slot[: HEAD.size] = HEAD.pack(MAGIC, offset, len(header), hashed(header), seen, WHOLE)
        return offset + len(header)

    def steps(self, shardings: Mapping[str, Any], shapes: Mapping[str, Any]) -> list[int]:
        """Steps of which this host's slots hold all that this process needs, oldest first; not verified yet."""
        found = {header["step"] for _, header in self._headers()}
        return sorted(step for step in found if self._lacks(step, shardings, shapes) is None)

    def restore(self, step: int, *, shapes: TrainState, shardings: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state of `step` placed by `shardings`, and what was saved beside it.

        Raises DamagedCheckpoint where a slot is not what was written, or something is missing.
        """
        wanted, placed = by_path(tree(shapes)), by_path(tree(shardings))
        if lack := self._lacks(step, placed, wanted):
            raise DamagedCheckpoint(f"snapshot {step} in {self._directory}: {lack} is not there")
        parts: Parts = {}
        data: dict[str, Any] = {}
        for path, header in self._headers():
            if header["step"] == step:
                data = header["data"]
                self._read(path, header, parts)
        arrays = {
            name: jax.make_array_from_callback(
                like.shape, placed[name], lambda index, name=name, like=like: _shard(parts[name], index, like)
            )
            for name, like in wanted.items()
        }
        leaves = [arrays.get(name) for name in names(shapes)]
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves), data

    def clear(self) -> None:
        """Delete every slot: the run has ended, or another one begins under its name."""
        self._open.clear()
        for path in self._files():
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another process still has its own there
            self._directory.rmdir()

    def _files(self) -> list[Path]:
        return sorted(self._directory.glob("[0-9]*.[01]")) if self._directory.is_dir() else []

    def _headers(self) -> list[tuple[Path, dict[str, Any]]]:
        """The slots that say they are whole, with their headers, which are."""
        found = []
        for path in self._files():
            with path.open("rb") as file:
                head = file.read(HEAD.size)
                if len(head) < HEAD.size:
                    continue
                magic, offset, length, seen, _, state = HEAD.unpack(head)
                if magic != MAGIC or state != WHOLE or offset + length > path.stat().st_size:
                    continue
                file.seek(offset)
                header = file.read(length)
                if hashed(header) == seen:
                    found.append((path, json.loads(header)))
        return found

    def _older(self) -> int:
        """Which of this process's slots to write: the one without a snapshot, else that of the lower step."""
        known = {path.name: header["step"] for path, header in self._headers()}
        return min((0, 1), key=lambda slot: known.get(f"{jax.process_index()}.{slot}", -1))

    def _lacks(self, step: int, shardings: Mapping[str, Any], shapes: Mapping[str, Any]) -> str | None:
        """The first array of which the slots of `step` do not hold all that this process needs."""
        boxes: dict[str, set[Box]] = {}
        kinds: dict[str, tuple] = {}
        for _, header in self._headers():
            if header["step"] == step:
                for path, entry in header["arrays"].items():
                    boxes.setdefault(path, set()).update(_box(box) for box, _, _ in entry["parts"])
                    kinds[path] = (tuple(entry["shape"]), entry["dtype"])
        for path, like in shapes.items():
            if kinds.get(path) != (tuple(like.shape), str(like.dtype)):
                return path
            needed = shardings[path].addressable_devices_indices_map(tuple(like.shape)).values()
            if not all(covered(boxes[path], box_of(index, like.shape)) for index in needed):
                return path
        return None

    def _read(self, path: Path, header: Mapping[str, Any], parts: Parts) -> None:
        """Add the parts of a slot. Raises DamagedCheckpoint where it is not what was written."""
        content = np.fromfile(path, np.uint8)
        _, offset, _, _, seen, _ = HEAD.unpack(content[: HEAD.size].tobytes())
        if hashed(content[START:offset]) != seen:
            raise DamagedCheckpoint(f"snapshot {header['step']}: {path} is not what was written")
        for name, entry in header["arrays"].items():
            dtype = jax.numpy.dtype(entry["dtype"])
            for box, place, size in entry["parts"]:
                shape = [stop - start for start, stop in box]
                parts.setdefault(name, {})[_box(box)] = content[place : place + size].view(dtype).reshape(shape)

    def _slot(self, path: Path, size: int) -> mmap.mmap:
        """The slot's memory, kept open between saves so that its pages are there already."""
        slot = self._open.get(path)
        if slot is None or len(slot) < size:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            with path.open("a+b") as file:
                # Reserved first: writing to memory that is not there would end the process.
                os.posix_fallocate(file.fileno(), 0, size)
                slot = self._open[path] = mmap.mmap(file.fileno(), 0)
        return slot


def hashed(content: Any) -> int:
    """xxh3 of bytes."""
    return xxhash.xxh3_64_intdigest(content)


def _box(edges: Any) -> Box:
    """A box from JSON."""
    return tuple((start, stop) for start, stop in edges)


def _shard(parts: Mapping[Box, np.ndarray], index: Any, like: Any) -> np.ndarray:
    """A device's elements, out of the parts of an array."""
    return cut(list(parts.items()), box_of(index, like.shape), like.dtype)


def memory_of(run: Path, *, layout: str) -> Memory:
    """The slots of the run in directory `run`, in /dev/shm where the system has it.

    Arrays are kept as the run holds them, so a run that goes on in another `layout` has slots of its own.
    """
    base = Path("/dev/shm") if Path("/dev/shm").is_dir() else run / "memory"
    return Memory(base / f"meshwright-{os.getuid()}" / xxhash.xxh3_64_hexdigest(f"{run.absolute()} {layout}".encode()))
