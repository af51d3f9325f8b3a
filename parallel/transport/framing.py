"""Frames on a byte stream: length, checksum, payload. No JAX.

    8 bytes length | 8 bytes XXH3 of the payload | payload          all big-endian

A frame that does not match its checksum, or is longer than any frame may be, is refused: nothing of it is used.
"""

import asyncio
import json
import struct
from typing import Any

import xxhash

HEAD = struct.Struct(">QQ")
CHUNK = 256 * 1024  # bytes of a payload in one frame: what a cut or damaged connection loses at most
LONGEST = 4 * CHUNK


class CorruptFrame(ConnectionError):
    """What arrived is not what was sent."""


def encode_frame(payload: bytes | memoryview) -> bytes:
    """`payload` as a frame."""
    return HEAD.pack(len(payload), xxhash.xxh3_64_intdigest(payload)) + bytes(payload)


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    """The next frame's payload. Raises Corrupt where it is damaged, IncompleteReadError where the stream ends."""
    length, checksum = HEAD.unpack(await reader.readexactly(HEAD.size))
    if length > LONGEST:
        raise CorruptFrame(f"a frame of {length} bytes was announced, and none is longer than {LONGEST}")
    payload = await reader.readexactly(length)
    if (found := xxhash.xxh3_64_intdigest(payload)) != checksum:
        raise CorruptFrame(f"a frame of {length} bytes has the checksum {found:016x}, not {checksum:016x}")
    return payload


def encode_message(**fields: Any) -> bytes:
    """A frame that holds a JSON object."""
    return encode_frame(json.dumps(fields, separators=(",", ":")).encode())


async def read_message(reader: asyncio.StreamReader) -> dict[str, Any]:
    """The next frame as a JSON object. Raises Corrupt where it is none."""
    payload = await read_frame(reader)
    try:
        found = json.loads(payload)
    except ValueError as error:
        raise CorruptFrame(f"a message is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise CorruptFrame(f"a message is {found!r:.50}, not an object")
    return found
