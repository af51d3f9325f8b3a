"""Fingerprints of arrays: xxh3 of each block of a logical array, the same for every mesh.

A logical array is one canonical array: an unpadded slice of an array of the run. Its shape alone determines its blocks,
at most `MAX_BLOCKS` along a dimension. The fingerprint of a block is xxh3 of its bytes in C order, so unlike a norm or
a sum it depends on the order of the elements. A process hashes the blocks that its own shards hold. Usual shardings do
not split a block between processes, so nothing is communicated; otherwise the array is gathered.

    blocks((16, 24))                             the boxes of the blocks of a logical array, in order
    fingerprints(array, [(slice(61),)])          of the logical arrays at these indices of a run's array
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import xxhash

Box = tuple[tuple[int, int], ...]  # (start, stop) in each dimension
Index = tuple[Any, ...]  # integers and slices into a run's array
LocalParts = list[tuple[Box, Any]]  # disjoint parts of an array: (box, elements)

# Maximum number of blocks along a dimension, by the number of dimensions: one per shard in usual meshes, and few enough
# for a small manifest.
MAX_BLOCKS = {0: 1, 1: 16, 2: 8, 3: 4}
MIN_BLOCK_ELEMENTS = 64  # arrays with two or more dimensions get fewer blocks rather than smaller ones


def block_edges(size: int, count: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of about `count` blocks along a dimension of `size`.

    The blocks are equal if `count` and `size` share a factor; else their length is a power of two.

    >>> list(edges(12, 8))
    [(0, 3), (3, 6), (6, 9), (9, 12)]
    >>> list(edges(5, 2))
    [(0, 4), (4, 5)]
    """
    divisor = math.gcd(size, count)
    length = size // divisor if divisor > 1 or count == 1 else 2 ** math.ceil(math.log2(max(size / count, 1)))
    for start in range(0, size, max(length, 1)):
        yield start, min(start + length, size)


def blocks(shape: Sequence[int]) -> list[Box]:
    """Return the boxes of the blocks of a logical array, in C order."""
    count = MAX_BLOCKS.get(len(shape), 2)
    while len(shape) > 1 and count > 1 and math.prod(shape) < MIN_BLOCK_ELEMENTS * count ** len(shape):
        count //= 2
    return list(itertools.product(*(block_edges(size, count) for size in shape)))


def logical_shape(shape: Sequence[int], index: Index) -> tuple[int, ...]:
    """Return the shape of `array[index]` for an array of `shape`; `index` holds integers and slices of step 1.

    >>> logical_shape((4, 64, 16), (2, slice(61)))
    (61, 16)
    """
    return tuple(stop - start for (start, stop), is_slice in index_bounds(shape, index) if is_slice)


def index_bounds(shape: Sequence[int], index: Index) -> list[tuple[tuple[int, int], bool]]:
    """Return for each dimension (start, stop) and whether `index` has a slice there, which keeps the dimension."""
    result = []
    for size, entry in zip(shape, (*index, *[slice(None)] * (len(shape) - len(index))), strict=True):
        if isinstance(entry, slice):
            start, stop, step = entry.indices(size)
            if step != 1:
                raise ValueError(f"index {index} has step {step}; a logical array must be a box of the run's array")
            result.append(((start, stop), True))
        else:
            result.append(((int(entry), int(entry) + 1), False))
    return result


def box_in_array(block: Box, shape: Sequence[int], index: Index) -> Box:
    """Return the box in the run's array of a `block` of the logical array at `index`."""
    edges = iter(block)
    box = []
    for (start, stop), is_slice in index_bounds(shape, index):
        low, high = next(edges) if is_slice else (0, stop - start)
        box.append((start + low, start + high))
    return tuple(box)


class HashInputs(NamedTuple):
    """The elements of an array on the host, and the boxes to hash. Any thread can hash them."""

    parts: LocalParts  # views if the backend allows it: they keep the memory of the array from being reused
    boxes: list[list[Box | None]]  # for each logical array, boxes in the run's array; None: another process hashes it
    dtype: Any


def fingerprints(array: Any, indices: Sequence[Index]) -> list[list[str | None]]:
    """Return the fingerprints of the blocks of each logical array `array[index]`; None if another process has a block.

    Collective if `array` is distributed: every process must call it for the same arrays in the same order.
    """
    return hash_blocks(prepare_hashing(array, indices))


def prepare_hashing(array: Any, indices: Sequence[Index]) -> HashInputs:
    """Return the inputs of `hash_blocks`. Collective if `array` is distributed."""
    targets = [[box_in_array(block, array.shape, index) for block in blocks(logical_shape(array.shape, index))]
              for index in indices]  # fmt: skip
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        owners = block_owners(array, [box for boxes in targets for box in boxes])
        if None in owners.values():  # a block is split between processes
            from jax.experimental import multihost_utils

            array = jax.device_put(array, array.sharding.with_memory_kind("device"))
            array = np.asarray(multihost_utils.process_allgather(array, tiled=True))
        else:
            process = jax.process_index()
            targets = [[box if owners[box] == process else None for box in boxes] for boxes in targets]
    return HashInputs(local_shards(array), targets, array.dtype)


def hash_blocks(inputs: HashInputs) -> list[list[str | None]]:
    """Return the fingerprints of the blocks of each logical array; None if another process has a block."""
    return [
        [None if box is None else fingerprint(extract_box(inputs.parts, box, inputs.dtype)) for box in boxes]
        for boxes in inputs.boxes
    ]


def block_owners(array: jax.Array, boxes: Sequence[Box]) -> dict[Box, int | None]:
    """Return box -> the lowest process whose shards hold all of it; None if no process does."""
    by_process: dict[int, set[Box]] = {}
    for device, index in array.sharding.devices_indices_map(array.shape).items():
        by_process.setdefault(device.process_index, set()).add(box_of(index, array.shape))
    return {
        box: next((process for process in sorted(by_process) if covers(by_process[process], box)), None)
        for box in boxes
    }


def covers(parts: set[Box], box: Box) -> bool:
    """Return whether the disjoint `parts` hold all of `box`."""
    return sum(volume(overlap(part, box)) for part in parts) == volume(box)


def local_shards(array: Any) -> LocalParts:
    """Return the distinct shards of `array` of this process, on the host, without a copy if the backend allows it."""
    if not isinstance(array, jax.Array):
        return [(tuple((0, size) for size in array.shape), np.asarray(array))]
    parts: dict[Box, Any] = {}
    for shard in array.addressable_shards:
        parts.setdefault(box_of(shard.index, array.shape), shard.data)
    return [(box, np.asarray(data)) for box, data in parts.items()]


def extract_box(parts: LocalParts, box: Box, dtype: Any) -> np.ndarray:
    """Return the elements of `box`: a view of one part, or a copy assembled from several."""
    result = np.empty([stop - start for start, stop in box], dtype)
    for part_box, data in parts:
        common = overlap(part_box, box)
        if volume(common) != volume(box) and not volume(common):
            continue
        elements = data[relative_slices(common, part_box)]
        if common == box:
            return elements
        result[relative_slices(common, box)] = elements
    return result


def relative_slices(inner: Box, outer: Box) -> tuple[slice, ...]:
    """Return the slices of the box `inner` in an array that holds the box `outer`."""
    return tuple(slice(low - start, high - start) for (low, high), (start, _) in zip(inner, outer, strict=True))


def fingerprint(block: np.ndarray) -> str:
    """Return the xxh3 of the bytes of `block` in C order, 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(block).reshape(-1).view(np.uint8))


def box_of(index: Index, shape: Sequence[int]) -> Box:
    """Return `index` into an array of `shape` as a box."""
    return tuple(edges for edges, _ in index_bounds(shape, index))


def overlap(a: Box, b: Box) -> Box:
    """Return the intersection of two boxes; empty dimensions have stop = start."""
    return tuple((max(x, u), max(min(y, v), max(x, u))) for (x, y), (u, v) in zip(a, b, strict=True))


def volume(box: Box) -> int:
    """Return the number of elements in a box; 1 for the box of a scalar."""
    return math.prod(stop - start for start, stop in box)
