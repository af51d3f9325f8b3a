"""Documents in text files: sources `text`, and `stdlib`, the source code of the installed Python's standard library.

A file is one document, or several between separators. Files are in the order of their paths and are read at every
access; only the spans of documents are kept in memory.
"""

import sysconfig
from collections.abc import Iterator
from mmap import ACCESS_READ, mmap
from pathlib import Path

import numpy as np
import xxhash

from ...configs.errors import UserError
from .documents import Documents, decode_utf8, digest


def file_documents(paths: list[Path], spans: np.ndarray, fingerprint: str) -> Documents:
    """One document for each row of `spans` [documents, 3] int64: number of the file, first byte, end."""

    def read(index: int) -> str:
        number, start, stop = spans[index].tolist()
        with open(paths[number], "rb") as file:
            file.seek(start)
            return decode_utf8(file.read(stop - start), origin=str(paths[number]), offset=start)

    return Documents(len(spans), read, fingerprint)


def open_text_files(paths: list[Path], *, separator: str | None) -> Documents:
    """The documents of the files: each file, or each non-empty span between separators."""
    digests = []

    def spans() -> Iterator[tuple[int, int, int]]:
        for number, path in enumerate(paths):
            content = map_file(path)
            digests.append(xxhash.xxh3_128_hexdigest(content))
            parts = [(0, len(content))] if separator is None else split_spans(content, separator.encode())
            yield from ((number, start, stop) for start, stop in parts if stop > start)

    table = np.fromiter(spans(), np.dtype((np.int64, 3)))  # 24 bytes per document, because there may be very many
    return file_documents(paths, table, digest("text", str(separator), *digests))


def split_spans(content: bytes | mmap, separator: bytes) -> Iterator[tuple[int, int]]:
    """(start, stop) of the spans between separators.

    >>> list(split_spans(b"one--two", b"--"))
    [(0, 3), (5, 8)]
    """
    start = 0
    while (stop := content.find(separator, start)) >= 0:
        yield start, stop
        start = stop + len(separator)
    yield start, len(content)


def open_standard_library() -> tuple[list[Path], Documents]:
    """(paths, documents): every UTF-8 .py file of the interpreter's standard library, without installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    paths, sizes, digests = [], [], []
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages"} & set(path.relative_to(root).parts):
            continue
        content = path.read_bytes()
        try:
            content.decode("utf-8")
        except UnicodeDecodeError:  # tests of the library have files in other encodings
            continue
        paths.append(path)
        sizes.append(len(content))
        digests.append(xxhash.xxh3_128_hexdigest(content))
    if not paths:
        raise UserError(
            f"data.source: stdlib finds no .py file in {root}, because this Python has no source code; use another "
            "source"
        )
    spans = np.stack([np.arange(len(paths)), np.zeros_like(sizes), sizes], axis=1)
    return paths, file_documents(paths, spans, digest("stdlib", *digests))


def map_file(path: Path) -> bytes | mmap:
    """The memory-mapped file, which may be larger than memory. Raises UserError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            empty = file.seek(0, 2) == 0  # an empty file cannot be mapped
            return b"" if empty else mmap(file.fileno(), 0, access=ACCESS_READ)
    except OSError as error:
        raise UserError(f"data.path: {path} cannot be read: {error.strerror}; check its permissions") from error
