"""Fingerprints of arrays: xxh3 over each block of the logical array, the same for every mesh.

A logical array is cut into blocks by its shape alone, into at most `PIECES` along a dimension. A block's fingerprint is
xxh3 of its bytes in C order, so it knows the order of elements, where a norm or a sum does not. A process hashes the
blocks that its own shards hold; shards of the usual divisions hold whole blocks, so nothing travels. Where a block lies
across processes the array is gathered.

    blocks((16, 24))                             the boxes of a logical array, in order
    fingerprints(array, [(slice(61),)])          of the logical arrays that lie in a run's array at these indices
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import xxhash

Box = tuple[tuple[int, int], ...]  # (start, stop) of each dimension
Index = tuple[Any, ...]  # integers and slices into a run's array
Held = list[tuple[Box, Any]]  # disjoint parts of an array: where, and what

# Pieces a dimension is cut into at most, by the number of dimensions: enough for usual shards, yet a small manifest.
PIECES = {0: 1, 1: 16, 2: 8, 3: 4}
SMALLEST = 64  # elements of a block of a matrix, below which it is cut into fewer


def edges(size: int, pieces: int) -> Iterator[tuple[int, int]]:
    """(start, stop) along one dimension: equal parts where `pieces` shares a factor with `size`, else powers of two.

    >>> list(edges(12, 8))
    [(0, 3), (3, 6), (6, 9), (9, 12)]
    >>> list(edges(5, 2))
    [(0, 4), (4, 5)]
    """
    shared = math.gcd(size, pieces)
    edge = size // shared if shared > 1 or pieces == 1 else 2 ** math.ceil(math.log2(max(size / pieces, 1)))
    for start in range(0, size, max(edge, 1)):
        yield start, min(start + edge, size)


def blocks(shape: Sequence[int]) -> list[Box]:
    """The blocks of a logical array, in C order."""
    pieces = PIECES.get(len(shape), 2)
    while len(shape) > 1 and pieces > 1 and math.prod(shape) < SMALLEST * pieces ** len(shape):
        pieces //= 2
    result: list[Box] = [()]
    for size in shape:
        cuts = list(edges(size, pieces))
        result = [(*box, cut) for box in result for cut in cuts]
    return result


def logical_shape(shape: Sequence[int], index: Index) -> tuple[int, ...]:
    """Shape of `array[index]` for an array of `shape`; `index` holds integers and slices of step 1.

    >>> logical_shape((4, 64, 16), (2, slice(61)))
    (61, 16)
    """
    return tuple(stop - start for (start, stop), kept in bounds(shape, index) if kept)


def bounds(shape: Sequence[int], index: Index) -> list[tuple[tuple[int, int], bool]]:
    """(start, stop) of each dimension of the run's array, and whether the logical array keeps that dimension."""
    result = []
    for size, part in zip(shape, (*index, *[slice(None)] * (len(shape) - len(index))), strict=True):
        if isinstance(part, slice):
            start, stop, step = part.indices(size)
            if step != 1:
                raise ValueError(f"index {index}: step {step}; a logical array is a box of the run's")
            result.append(((start, stop), True))
        else:
            result.append(((int(part), int(part) + 1), False))
    return result


def placed(block: Box, shape: Sequence[int], index: Index) -> Box:
    """Where a block of the logical array lies in the run's array."""
    inner = iter(block)
    box = []
    for (start, stop), kept in bounds(shape, index):
        low, high = next(inner) if kept else (0, stop - start)
        box.append((start + low, start + high))
    return tuple(box)


class Prepared(NamedTuple):
    """An array's elements on the host, and the boxes to hash: all that hashing needs, on any thread."""

    parts: Held  # where the backend allows it views: the array's memory is not reused while they live
    boxes: list[list[Box | None]]  # of every logical array, in the run's array; None: another process's
    dtype: Any


def fingerprints(array: Any, indices: Sequence[Index]) -> list[list[str | None]]:
    """Of every logical array `array[index]`: the fingerprints of its blocks; None where another process holds one.

    Collective where `array` is: every process of the run must ask for the same arrays in the same order.
    """
    return hashed(prepared(array, indices))


def prepared(array: Any, indices: Sequence[Index]) -> Prepared:
    """What `hashed` needs. Collective where `array` is."""
    wanted = [[placed(block, array.shape, index) for block in blocks(logical_shape(array.shape, index))]
              for index in indices]  # fmt: skip
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        owner = owners(array, [box for boxes in wanted for box in boxes])
        if None in owner.values():  # a block across processes
            from jax.experimental import multihost_utils

            array = jax.device_put(array, array.sharding.with_memory_kind("device"))
            array = np.asarray(multihost_utils.process_allgather(array, tiled=True))
        else:
            mine = jax.process_index()
            wanted = [[box if owner[box] == mine else None for box in boxes] for boxes in wanted]
    return Prepared(held(array), wanted, array.dtype)


def hashed(ready: Prepared) -> list[list[str | None]]:
    """The fingerprints; None where another process holds a block."""
    return [
        [None if box is None else fingerprint(cut(ready.parts, box, ready.dtype)) for box in boxes]
        for boxes in ready.boxes
    ]


def owners(array: jax.Array, boxes: Sequence[Box]) -> dict[Box, int | None]:
    """Box -> the lowest process whose shards hold all of it; None where no process does."""
    by_process: dict[int, set[Box]] = {}
    for device, index in array.sharding.devices_indices_map(array.shape).items():
        by_process.setdefault(device.process_index, set()).add(box_of(index, array.shape))
    return {
        box: next((process for process in sorted(by_process) if covered(by_process[process], box)), None)
        for box in boxes
    }


def covered(parts: set[Box], box: Box) -> bool:
    """Whether disjoint `parts` hold all of `box`."""
    return sum(volume(overlap(part, box)) for part in parts) == volume(box)


def held(array: Any) -> Held:
    """This process's distinct shards of `array`, on the host, without a copy where the backend allows it."""
    if not isinstance(array, jax.Array):
        return [(tuple((0, size) for size in array.shape), np.asarray(array))]
    parts: dict[Box, Any] = {}
    for shard in array.addressable_shards:
        parts.setdefault(box_of(shard.index, array.shape), shard.data)
    return [(box, np.asarray(data)) for box, data in parts.items()]


def cut(parts: Held, box: Box, dtype: Any) -> np.ndarray:
    """The elements of `box`, out of one part or put together from several."""
    result = np.empty([stop - start for start, stop in box], dtype)
    for where, data in parts:
        common = overlap(where, box)
        if volume(common) != volume(box) and not volume(common):
            continue
        inside = data[tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(common, where, strict=True))]
        if common == box:
            return inside
        result[tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(common, box, strict=True))] = inside
    return result


def fingerprint(block: np.ndarray) -> str:
    """xxh3 of a block's bytes in C order, 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(block).reshape(-1).view(np.uint8))


def box_of(index: Index, shape: Sequence[int]) -> Box:
    """A shard's index as a box."""
    return tuple(part for part, _ in bounds(shape, index))


def overlap(a: Box, b: Box) -> Box:
    """What two boxes share; empty dimensions have stop = start."""
    return tuple((max(x, u), max(min(y, v), max(x, u))) for (x, y), (u, v) in zip(a, b, strict=True))


def volume(box: Box) -> int:
    """Elements in a box; 1 for a scalar's."""
    return math.prod(stop - start for start, stop in box)
