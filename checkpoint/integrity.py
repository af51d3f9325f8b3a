"""Manifests of arrays, and the comparison of arrays with a manifest.

part = describe(arrays, step=12, layout=layout, data={"samples": 192})
verify_arrays(loaded, manifest, where=directory)      # raises DamagedCheckpoint, which names array and block
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from .fingerprints import Index, blocks, fingerprints, hash_blocks, logical_shape, prepare_hashing
from .layout_conversion import Layout, covers_array
from .manifest import DamagedCheckpoint, LogicalArray, Manifest, index_from_json, index_to_json


def describe(arrays: Mapping[str, Any], *, step: int, layout: Layout, data: Mapping[str, Any]) -> Manifest:
    """Return the part of a manifest that this process knows. `arrays`: path -> array, or a shape (no fingerprints)."""
    return prepare_description(arrays, step=step, layout=layout, data=data)()


def prepare_description(
    arrays: Mapping[str, Any], *, step: int, layout: Layout, data: Mapping[str, Any]
) -> Callable[[], Manifest]:
    """Return a function that does the hashing of `describe`. Any thread may call it, and `arrays` may be freed now."""
    canonical = {path: layout.locate(path, tuple(array.shape)) for path, array in sorted(arrays.items())}
    indices: dict[str, list[Index]] = {}
    for path, located in canonical.items():
        named = [index for _, index in located]
        # Padding and optax's placeholders have no canonical name: the whole array is fingerprinted as stored.
        indices[path] = named if covers_array(tuple(arrays[path].shape), named) else [*named, ()]
    for array in arrays.values():
        if isinstance(array, jax.Array):
            array.copy_to_host_async()  # start all copies before the first is waited for
    inputs = {
        path: None if isinstance(arrays[path], jax.ShapeDtypeStruct) else prepare_hashing(arrays[path], indices[path])
        for path in canonical
    }
    stored = {path: [list(arrays[path].shape), str(arrays[path].dtype)] for path in canonical}

    def build_manifest() -> Manifest:
        named: dict[str, LogicalArray] = {}
        rest: dict[str, LogicalArray] = {}
        for path, (shape, dtype) in stored.items():
            hash_inputs = inputs[path]
            hashes = [[] for _ in indices[path]] if hash_inputs is None else hash_blocks(hash_inputs)
            entries = [
                LogicalArray(path, index_to_json(index), list(logical_shape(shape, index)), dtype, block_hashes)
                for index, block_hashes in zip(indices[path], hashes, strict=True)
            ]
            named |= {name: entry for (name, _), entry in zip(canonical[path], entries, strict=False)}
            if len(entries) > len(canonical[path]):
                rest[path] = entries[-1]
            inputs[path] = None  # free its memory
        return Manifest(step, layout.name, dict(data), stored, named, rest)

    return build_manifest


def verify_arrays(arrays: Mapping[str, Any], manifest: Manifest, *, where: Path) -> None:
    """Compare stored arrays (path -> array) with `manifest`. Raises DamagedCheckpoint, which names array and block.

    Each process compares the blocks that it holds; afterwards the processes must agree on the verdict.
    """
    entries: dict[str, list[tuple[str, LogicalArray]]] = {}
    for name, entry in manifest.all_entries().items():
        entries.setdefault(entry.path, []).append((name, entry))
    damaged = []
    for path, array in sorted(arrays.items()):
        named_entries = entries.get(path, [])
        hashes = fingerprints(array, [index_from_json(entry.index) for _, entry in named_entries])
        for (name, entry), actual in zip(named_entries, hashes, strict=True):
            damaged += [
                f"{name} block {number} {box}"
                for number, (block, expected, box) in enumerate(
                    zip(actual, entry.blocks, blocks(entry.shape), strict=True)
                )
                if block not in (None, expected)
            ]
    if damaged:
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        raise DamagedCheckpoint(f"checkpoint {where}: {damaged[0]}{more} differs from what was saved")
