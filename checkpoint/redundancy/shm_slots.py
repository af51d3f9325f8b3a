"""Slots: files in memory that are either complete or empty. JAX-free.

    0 .. 64     the preamble: magic, step, offset and length of the header, xxh3 of the header, state
    64 ..       the blocks, then the header: JSON with `step`, `blocks` [[offset, bytes, xxh3], ...] and their meaning

A slot is marked empty, then written, each block hashed as it arrives, and marked complete last. It is a plain file in
/dev/shm, so it outlives the process that wrote it, even if that was killed (segments of Python's `shared_memory` do
not). Its pages are reused for the next snapshot, because touching new pages is several times slower than copying. Each
process has two slots, DIRECTORY/3.0 and DIRECTORY/3.1 for launch slot 3.

    with write_slot(pool, path, [300, 4096], {"step": 7}) as writer:
        writer.write(0, first), writer.write(1, second)   # blocks in any order, at once or in parts
    header = read_header(path)                            # of a complete slot; None of any other
    verify_slot(path, header)                             # raises DamagedCheckpoint, which names the block
"""

import itertools
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

MAGIC, COMPLETE, EMPTY = b"MESHSLOT", 2, 0
PREAMBLE = struct.Struct("<8sqQQQQ16x")  # magic, step, offset of the header, its length, its xxh3, state
START = ALIGNMENT = 64  # bytes
CHUNK_BYTES = 4 * 2**20  # a chunk is copied, then hashed while it is still in the cache

Header = dict[str, Any]


def slot_paths(directory: Path, launch_slot: int) -> tuple[Path, Path]:
    """Return the paths of both slots of the process in a launch slot."""
    return directory / f"{launch_slot}.0", directory / f"{launch_slot}.1"


def slot_files(directory: Path) -> list[Path]:
    """Return the slots of all processes in `directory`, in order; empty if there is no such directory."""
    return sorted(directory.glob("[0-9]*.[01]"))


class SlotPool:
    """The slots that a process has mapped into its memory."""

    def __init__(self) -> None:
        self._open: dict[Path, mmap.mmap] = {}

    def map_slot(self, path: Path, size: int) -> mmap.mmap:
        """Return the memory of a slot, at least `size` bytes, already touched. Raises OSError if there is no space."""
        slot = self._open.get(path)
        if slot is None or len(slot) < size or not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with path.open("a+b") as file:
                # Reserve the space first: writing to unreserved pages of a full file system kills the process.
                os.posix_fallocate(file.fileno(), 0, size)
                slot = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
            self._open[path] = slot
        return slot

    def close(self) -> None:
        """Unmap all slots; the files stay."""
        self._open.clear()


class SlotWriter:
    """Writes the blocks of one slot."""

    def __init__(self, memory: mmap.mmap, sizes: Sequence[int], total: int) -> None:
        self._memory = np.frombuffer(memory, np.uint8, total)
        self._offsets = block_offsets(sizes)
        self._hashes = [xxhash.xxh3_64() for _ in sizes]
        self._sizes, self._written = sizes, [0] * len(sizes)

    def write(self, number: int, content: np.ndarray) -> None:
        """Append `content` to block `number`."""
        content = np.ascontiguousarray(content).reshape(-1).view(np.uint8)
        for start in range(0, len(content), CHUNK_BYTES):
            chunk = content[start : start + CHUNK_BYTES]
            with self.write_region(number, len(chunk)) as region:
                np.copyto(region, chunk)

    @contextmanager
    def write_region(self, number: int, size: int) -> Iterator[np.ndarray]:
        """Give the next `size` bytes of block `number`, to be filled in the `with`."""
        start = self._offsets[number] + self._written[number]
        region = self._memory[start : start + size]
        yield region
        self._hashes[number].update(region)
        self._written[number] += size

    def finish(self) -> list[list[Any]]:
        """Return [offset, bytes, xxh3] of every block. Raises ValueError if a block is not complete."""
        if self._written != list(self._sizes):
            raise ValueError(f"blocks of {list(self._sizes)} bytes were declared complete after {self._written} bytes")
        for offset, size, hash_ in zip(self._offsets, self._sizes, self._hashes, strict=True):
            padding = self._memory[offset + size : offset + padded_size(size)]
            padding[:] = 0  # an earlier snapshot may have left bytes here, and parity is computed from every byte
            hash_.update(padding)
        digests = [hash_.hexdigest() for hash_ in self._hashes]
        return [list(block) for block in zip(self._offsets, self._sizes, digests, strict=True)]


def padded_size(size: int) -> int:
    """Return `size` rounded up to the alignment of blocks."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def block_offsets(sizes: Sequence[int]) -> list[int]:
    """Return the offsets of blocks of these sizes.

    >>> block_offsets([8, 100, 4])
    [64, 128, 256]
    """
    return list(itertools.accumulate(map(padded_size, sizes), initial=START))[:-1]


def header_offset(sizes: Sequence[int]) -> int:
    """Return the offset of the header, behind blocks of these sizes."""
    return START + sum(map(padded_size, sizes))


@contextmanager
def write_slot(pool: SlotPool, path: Path, sizes: Sequence[int], header: Mapping[str, Any]) -> Iterator[SlotWriter]:
    """Write blocks of `sizes` to the slot at `path`. It is complete once the `with` ends without an error, else empty.

    Raises OSError if there is no space.
    """
    end = header_offset(sizes)
    longest = end + len(encode_header(header, [[end, end, "0" * 16]] * len(sizes)))
    memory = pool.map_slot(path, longest)
    memory[: PREAMBLE.size] = PREAMBLE.pack(MAGIC, -1, 0, 0, 0, EMPTY)
    writer = SlotWriter(memory, sizes, longest)
    yield writer
    text = encode_header(header, writer.finish())
    memory[end : end + len(text)] = text
    memory[: PREAMBLE.size] = PREAMBLE.pack(
        MAGIC, header["step"], end, len(text), xxhash.xxh3_64_intdigest(text), COMPLETE
    )


def encode_header(header: Mapping[str, Any], blocks: Sequence[Any]) -> bytes:
    """Return the bytes of a header with the `blocks` of its slot."""
    return json.dumps({**header, "blocks": blocks}).encode()


class Preamble(NamedTuple):
    """The parsed preamble of a complete slot. It contains a hash of the header, so no two slots have the same."""

    raw: bytes
    step: int
    offset: int  # of the header
    length: int  # of the header
    checksum: int  # xxh3 of the header

    @property
    def bytes(self) -> int:
        """Number of bytes that the slot uses."""
        return self.offset + self.length


def read_preamble(path: Path) -> Preamble | None:
    """Read the preamble of a slot; None unless the slot is complete."""
    try:
        with path.open("rb") as file:
            raw = file.read(PREAMBLE.size)
            size = os.fstat(file.fileno()).st_size
    except OSError:
        return None
    if len(raw) < PREAMBLE.size:
        return None
    magic, step, offset, length, checksum, state = PREAMBLE.unpack(raw)
    if magic != MAGIC or state != COMPLETE or offset + length > size:
        return None
    return Preamble(raw, step, offset, length, checksum)


def slot_step(path: Path) -> int:
    """Return the step of a slot; -1 unless the slot is complete."""
    preamble = read_preamble(path)
    return -1 if preamble is None else preamble.step


def read_header(path: Path) -> Header | None:
    """Read the header of a slot; None unless the slot is complete and its header undamaged."""
    preamble = read_preamble(path)
    if preamble is None:
        return None
    with path.open("rb") as file:
        file.seek(preamble.offset)
        text = file.read(preamble.length)
    if xxhash.xxh3_64_intdigest(text) != preamble.checksum:
        return None
    header = json.loads(text)
    # The slot may have been rewritten meanwhile: the preamble must still be the same.
    return header if header["step"] == preamble.step and read_preamble(path) == preamble else None


def verify_slot(path: Path, header: Header) -> np.ndarray:
    """Return the content of a slot, uint8. Raises DamagedCheckpoint if a block differs from what was written."""
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise DamagedCheckpoint(f"snapshot {header['step']}: {path} cannot be read: {error}") from error
    for number, (offset, size, digest) in enumerate(header["blocks"]):
        if xxhash.xxh3_64_hexdigest(content[offset : offset + padded_size(size)]) != digest:
            raise DamagedCheckpoint(
                f"snapshot {header['step']}: block {number} of {path} differs from what was written"
            )
    return content
