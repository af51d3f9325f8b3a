"""Collections of documents: all that the rest of the data path knows about a source.

A document is a string. Its role (trained on or held out, its place in the packing) follows from its content and its
index in the collection, never from the time or the process that reads it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import xxhash

from ...configs.errors import UserError


@dataclass(frozen=True)
class Documents:
    """An immutable sequence of documents."""

    count: int
    read: Callable[[int], str]  # index -> text
    fingerprint: str  # changes with the text or the order of any document

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.read(index)


def nonempty_texts(documents: Documents) -> Iterator[tuple[int, str]]:
    """(index, text) of every document that is not empty."""
    for index in range(len(documents)):
        if text := documents[index]:
            yield index, text


def digest(*parts: str) -> str:
    """A 128-bit hash of the parts, in hexadecimal; it depends on where one part ends and the next starts."""
    state = xxhash.xxh3_128()
    for part in parts:
        encoded = part.encode()
        state.update(len(encoded).to_bytes(8, "little") + encoded)
    return state.hexdigest()


def decode_utf8(raw: bytes, *, origin: str, offset: int = 0) -> str:
    """UTF-8 bytes as text; `offset` is where `raw` starts in `origin`. Raises UserError with file and byte."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        position = offset + error.start
        raise UserError(
            f"data.path: {origin} is not UTF-8: byte {position} is 0x{raw[error.start]:02x}; "
            "convert it (iconv -t UTF-8) or remove it"
        ) from None
