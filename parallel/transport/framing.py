"""Frames of the payload server on an asyncio stream: length, checksum, payload. No JAX.

    8 bytes length | 8 bytes XXH3 of the payload | payload          all big-endian

A frame that does not match its checksum, or is longer than `MAX_FRAME_BYTES`, is refused: nothing of it is used.
"""

import asyncio
import json
import struct
from typing import Any

import xxhash

HEADER = struct.Struct(">QQ")  # length, checksum
CHUNK_BYTES = 256 * 1024  # of a payload in one frame: the most that a cut or damaged connection loses
MAX_FRAME_BYTES = 4 * CHUNK_BYTES


class CorruptFrame(ConnectionError):
    """The received bytes are not those that were sent."""


def encode_frame(payload: bytes | memoryview) -> bytes:
    """`payload` as a frame."""
    return HEADER.pack(len(payload), xxhash.xxh3_64_intdigest(payload)) + bytes(payload)


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    """The next frame's payload. Raises CorruptFrame if it is damaged, IncompleteReadError if the stream ends."""
    length, checksum = HEADER.unpack(await reader.readexactly(HEADER.size))
    if length > MAX_FRAME_BYTES:
        raise CorruptFrame(f"a frame announces {length} bytes, but no frame is longer than {MAX_FRAME_BYTES}")
    payload = await reader.readexactly(length)
    if (found := xxhash.xxh3_64_intdigest(payload)) != checksum:
        raise CorruptFrame(f"a frame of {length} bytes has the checksum {found:016x}, not {checksum:016x}")
    return payload


def encode_message(**fields: Any) -> bytes:
    """A frame that holds a JSON object."""
    return encode_frame(json.dumps(fields, separators=(",", ":")).encode())


async def read_message(reader: asyncio.StreamReader) -> dict[str, Any]:
    """The next frame as a JSON object. Raises CorruptFrame if it is not one."""
    payload = await read_frame(reader)
    try:
        message = json.loads(payload)
    except ValueError as error:
        raise CorruptFrame(f"a message is not JSON: {error}") from error
    if not isinstance(message, dict):
        raise CorruptFrame(f"a message is {message!r:.50}, not an object")
    return message
