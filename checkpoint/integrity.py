"""What a state is (its manifest), and whether what was read is that.

part = described(arrays, step=12, layout=layout, data={"samples": 192})
verify(loaded, manifest, where=directory)             # raises DamagedCheckpoint naming array and block
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from .fingerprints import Index, blocks, fingerprints, hashed, logical_shape, prepared
from .layout_conversion import Layout, whole
from .manifest import DamagedCheckpoint, Logical, Manifest, decoded, encoded


def described(arrays: Mapping[str, Any], *, step: int, layout: Layout, data: Mapping[str, Any]) -> Manifest:
    """The manifest of a state by path, as far as this process sees it. Of shapes alone: without fingerprints."""
    return describing(arrays, step=step, layout=layout, data=data)()


def describing(
    arrays: Mapping[str, Any], *, step: int, layout: Layout, data: Mapping[str, Any]
) -> Callable[[], Manifest]:
    """`described`, with the hashing put off: the arrays may be given up now, and any thread may call the result."""
    placed = {path: layout.places(path, tuple(array.shape)) for path, array in sorted(arrays.items())}
    indices: dict[str, list[Index]] = {}
    for path, named in placed.items():
        own = [index for _, index in named]
        # Padding, and what optax keeps where it has nothing to remember, have no name and are vouched for as stored.
        indices[path] = own if whole(tuple(arrays[path].shape), own) else [*own, ()]
    for array in arrays.values():
        if isinstance(array, jax.Array):
            array.copy_to_host_async()  # all at once, before the first is waited for
    ready = {
        path: None if isinstance(arrays[path], jax.ShapeDtypeStruct) else prepared(arrays[path], indices[path])
        for path in placed
    }
    stored = {path: [list(arrays[path].shape), str(arrays[path].dtype)] for path in placed}

    def described() -> Manifest:
        named: dict[str, Logical] = {}
        rest: dict[str, Logical] = {}
        for path, (shape, dtype) in stored.items():
            hold = ready[path]
            seen = [[] for _ in indices[path]] if hold is None else hashed(hold)
            entries = [
                Logical(path, encoded(index), list(logical_shape(shape, index)), dtype, found)
                for index, found in zip(indices[path], seen, strict=True)
            ]
            named |= {name: entry for (name, _), entry in zip(placed[path], entries, strict=False)}
            if len(entries) > len(placed[path]):
                rest[path] = entries[-1]
            ready[path] = None  # its memory is free again
        return Manifest(step, layout.name, dict(data), stored, named, rest)

    return described


def verify(arrays: Mapping[str, Any], manifest: Manifest, *, where: Path) -> None:
    """Compare arrays by path, as stored, with the manifest. Raises DamagedCheckpoint naming array and block.

    With several processes each compares the blocks it holds; they must agree on the verdict afterwards.
    """
    entries: dict[str, list[tuple[str, Logical]]] = {}
    for name, entry in manifest.everything().items():
        entries.setdefault(entry.path, []).append((name, entry))
    damaged = []
    for path, array in sorted(arrays.items()):
        own = entries.get(path, [])
        found = fingerprints(array, [decoded(entry.index) for _, entry in own])
        for (name, entry), seen in zip(own, found, strict=True):
            boxes = blocks(entry.shape)
            damaged += [
                f"{name} block {number} {box}"
                for number, (one, wanted, box) in enumerate(zip(seen, entry.blocks, boxes, strict=True))
                if one not in (None, wanted)
            ]
    if damaged:
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        raise DamagedCheckpoint(f"checkpoint {where}: {damaged[0]}{more} is not what was saved")
