"""What a state is (its manifest), and whether what was read is that.

part = described(arrays, step=12, layout=layout, data={"samples": 192})
verify(loaded, manifest, where=directory)             # raises DamagedCheckpoint naming array and block
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from .fingerprints import Index, blocks, fingerprints, logical_shape
from .layouts import Layout, whole
from .manifest import DamagedCheckpoint, Logical, Manifest, decoded, encoded


def described(arrays: Mapping[str, Any], *, step: int, layout: Layout, data: Mapping[str, Any]) -> Manifest:
    """The manifest of a state by path, as far as this process sees it. Of shapes alone: without fingerprints."""
    named: dict[str, Logical] = {}
    rest: dict[str, Logical] = {}
    for path, array in sorted(arrays.items()):
        shape = tuple(array.shape)
        placed = layout.places(path, shape)
        # Padding, and what optax keeps where it has nothing to remember, have no name and are vouched for as stored.
        unnamed = [] if whole(shape, [index for _, index in placed]) else [()]
        indices: list[Index] = [index for _, index in placed] + unnamed
        seen = [[] for _ in indices] if isinstance(array, jax.ShapeDtypeStruct) else fingerprints(array, indices)
        entries = [
            Logical(path, encoded(index), list(logical_shape(shape, index)), str(array.dtype), found)
            for index, found in zip(indices, seen, strict=True)
        ]
        for (name, _), entry in zip(placed, entries, strict=False):
            named[name] = entry
        if unnamed:
            rest[path] = entries[-1]
    stored = {path: [list(array.shape), str(array.dtype)] for path, array in sorted(arrays.items())}
    return Manifest(step, layout.name, dict(data), stored, named, rest)


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
