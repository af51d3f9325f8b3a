"""Slots: files in memory that are whole or empty, never half of something. JAX-free.

    0 .. 64     the head: magic, step, offset and length of the header, xxh3 of the header, state
    64 ..       the blocks, then the header: JSON with `step`, `blocks` [[offset, bytes, xxh3], ...] and what they are

A slot is emptied first, then filled, each block hashed as it arrives, and declared whole last. A slot lives in /dev/shm
as a plain file: it outlives the process that wrote it, killed or not (segments of Python's `shared_memory` do not), and
its pages are kept from one snapshot to the next, since touching new ones is several times slower than copying.

    with filling(pool, path, [300, 4096], {"step": 7}) as slot:
        slot.put(0, first), slot.put(1, second)           # in any order, in pieces or whole
    header = header_of(path)                              # of a whole slot; None of any other
    verify(path, header)                                  # raises DamagedCheckpoint naming the block
"""

import json
import mmap
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from ..errors import DamagedCheckpoint

MAGIC, WHOLE, EMPTY = b"MESHSLOT", 2, 0
HEAD = struct.Struct("<8sqQQQQ16x")  # magic, step, header's offset, its length, xxh3 of the header, state
START = ALIGNED = 64  # bytes
CHUNK_BYTES = 4 * 2**20  # bytes copied, then hashed while they are still in the cache

Header = dict[str, Any]


class SlotPool:
    """The slots a process has open: memory that is there already. Bounded by the number of paths it is asked for."""

    def __init__(self) -> None:
        self._open: dict[Path, mmap.mmap] = {}

    def map_slot(self, path: Path, size: int) -> mmap.mmap:
        """The memory of a slot of at least `size` bytes, touched. Raises OSError where there is no room."""
        slot = self._open.get(path)
        if slot is None or len(slot) < size or not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with path.open("a+b") as file:
                # Reserved first: writing to memory that is not there would end the process.
                os.posix_fallocate(file.fileno(), 0, size)
                slot = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
            self._open[path] = slot
        return slot

    def close(self) -> None:
        """Let go of all; the files stay."""
        self._open.clear()


class SlotWriter:
    """A slot that is being filled."""

    def __init__(self, memory: mmap.mmap, sizes: Sequence[int], total: int) -> None:
        self._memory = np.frombuffer(memory, np.uint8, total)
        self.offsets = block_offsets(sizes)
        self._hashes = [xxhash.xxh3_64() for _ in sizes]
        self._sizes, self._filled = sizes, [0] * len(sizes)

    def write(self, number: int, content: np.ndarray) -> None:
        """The next bytes of block `number`."""
        content = np.ascontiguousarray(content).reshape(-1).view(np.uint8)
        for start in range(0, len(content), CHUNK_BYTES):
            piece = content[start : start + CHUNK_BYTES]
            with self.write_region(number, len(piece)) as target:
                np.copyto(target, piece)

    @contextmanager
    def write_region(self, number: int, size: int) -> Iterator[np.ndarray]:
        """The next `size` bytes of block `number`, to be written in the `with`."""
        place = self.offsets[number] + self._filled[number]
        target = self._memory[place : place + size]
        yield target
        self._hashes[number].update(target)
        self._filled[number] += size

    def blocks(self) -> list[list[Any]]:
        """[offset, bytes, xxh3] of every block."""
        if self._filled != list(self._sizes):
            raise ValueError(f"a slot was declared whole with {self._filled} of {list(self._sizes)} bytes in it")
        for place, size, hash_ in zip(self.offsets, self._sizes, self._hashes, strict=True):
            rest = self._memory[place + size : place + padded_size(size)]
            rest[:] = 0  # what an earlier snapshot left there; parity is made of every byte
            hash_.update(rest)
        hashes = [one.hexdigest() for one in self._hashes]
        return [list(block) for block in zip(self.offsets, self._sizes, hashes, strict=True)]


def padded_size(size: int) -> int:
    """Bytes up to the next block."""
    return -(-size // ALIGNED) * ALIGNED


def block_offsets(sizes: Sequence[int]) -> list[int]:
    """Where blocks of these sizes begin.

    >>> offsets([8, 100, 4])
    [64, 128, 256]
    """
    result, offset = [], START
    for size in sizes:
        result.append(offset)
        offset += padded_size(size)
    return result


def header_offset(sizes: Sequence[int]) -> int:
    """Bytes up to the header."""
    return START + sum(map(padded_size, sizes))


@contextmanager
def write_slot(pool: SlotPool, path: Path, sizes: Sequence[int], header: Mapping[str, Any]) -> Iterator[SlotWriter]:
    """Fill the slot at `path` with blocks of `sizes`; it is whole once the `with` has ended well, empty before.

    Raises OSError where there is no room.
    """
    end = header_offset(sizes)
    longest = end + len(encode_header(header, [[end, end, "0" * 16]] * len(sizes)))
    memory = pool.map_slot(path, longest)
    memory[: HEAD.size] = HEAD.pack(MAGIC, -1, 0, 0, 0, EMPTY)
    slot = SlotWriter(memory, sizes, longest)
    yield slot
    text = encode_header(header, slot.blocks())
    memory[end : end + len(text)] = text
    memory[: HEAD.size] = HEAD.pack(MAGIC, header["step"], end, len(text), xxhash.xxh3_64_intdigest(text), WHOLE)


def encode_header(header: Mapping[str, Any], blocks: Sequence[Any]) -> bytes:
    """The header's bytes."""
    return json.dumps({**header, "blocks": blocks}).encode()


class Head(NamedTuple):
    """The first bytes of a whole slot, which no other slot has, and what they say."""

    raw: bytes
    step: int
    offset: int  # of the header
    length: int  # of the header
    checksum: int  # xxh3 of the header

    @property
    def bytes(self) -> int:
        """Bytes the slot uses."""
        return self.offset + self.length


def read_head(path: Path) -> Head | None:
    """The head of a whole slot; None of any other."""
    try:
        with path.open("rb") as file:
            raw = file.read(HEAD.size)
            size = os.fstat(file.fileno()).st_size
    except OSError:
        return None
    if len(raw) < HEAD.size:
        return None
    magic, step, offset, length, seen, state = HEAD.unpack(raw)
    if magic != MAGIC or state != WHOLE or offset + length > size:
        return None
    return Head(raw, step, offset, length, seen)


def read_header(path: Path) -> Header | None:
    """The header of a whole slot, which is what was written; None where there is no such slot."""
    head = read_head(path)
    if head is None:
        return None
    with path.open("rb") as file:
        file.seek(head.offset)
        text = file.read(head.length)
    if xxhash.xxh3_64_intdigest(text) != head.checksum:
        return None
    header = json.loads(text)
    # Neither of a slot that was emptied meanwhile, nor under another step's head.
    return header if header["step"] == head.step and read_head(path) == head else None


def verify_slot(path: Path, header: Header) -> np.ndarray:
    """The content of the slot, block by block what was written. Raises DamagedCheckpoint where it is not."""
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise DamagedCheckpoint(f"snapshot {header['step']}: {path} cannot be read: {error}") from error
    for number, (offset, size, seen) in enumerate(header["blocks"]):
        if xxhash.xxh3_64_hexdigest(content[offset : offset + padded_size(size)]) != seen:
            raise DamagedCheckpoint(f"snapshot {header['step']}: block {number} of {path} is not what was written")
    return content
