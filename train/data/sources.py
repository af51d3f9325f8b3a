"""The table of sources: the word in `data.source` -> a collection of documents."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from ...configs.errors import UserError
from ...configs.sections.data import SourceConfig
from .chat import Template
from .docstrings import Docstrings, library_pairs
from .documents import Documents, First, digest
from .formats import Mismatched, Reader, reader_of
from .source_paths import matching
from .streaming_source import Stream
from .synthetic import Synthetic
from .table_sources import hub_dataset, hub_stream, json_lines, table_files
from .text_files import standard_library, text_files

SYNTHETIC_DOCUMENTS = 1000

# settings, the key they stand under, what a row says, cache directory
Opener = Callable[[SourceConfig, str, Reader, Path], Documents]


def open_source(source: SourceConfig, *, key: str, cache: Path, template: Template | None = None) -> Documents:
    """The documents of one source. Raises UserError when there are none."""
    documents = SOURCES[source.kind](source, key, reader_of(source, template), cache)
    if source.documents is not None:
        documents = First(documents, source.documents)
    if not len(documents):
        raise UserError(f"{key}.path: {source.path} holds no documents; it must hold at least one with text")
    if source.format == "unpaired":
        if len(documents) < 2:
            raise UserError(f"{key}.path: {source.path} holds one example; unpaired ones are compared with others")
        return Mismatched(documents)
    return documents


def open_stream(source: SourceConfig, *, window: int, cache: Path, template: Template | None = None) -> Stream:
    """The documents of an hf source, read as they are needed. Raises UserError when there is no such source."""
    stream = hub_stream(source.path, name=source.name, split=source.split, reader=reader_of(source, template))

    def first(skip: int) -> Iterator[str]:
        stop = None if source.documents is None else max(source.documents - skip, 0)
        return islice(stream.read(skip), stop)

    return Stream(first, size=window, fingerprint=digest(stream.fingerprint, str(source.documents)), cache=cache)


def _stdlib(source: SourceConfig, key: str, reader: Reader, cache: Path) -> Documents:
    return standard_library()


def _text(source: SourceConfig, key: str, reader: Reader, cache: Path) -> Documents:
    return text_files(matching(source.path, kind=source.kind, key=key), separator=source.separator)


def _jsonl(source: SourceConfig, key: str, reader: Reader, cache: Path) -> Documents:
    return json_lines(matching(source.path, kind=source.kind, key=key), reader=reader)


def _table(source: SourceConfig, key: str, reader: Reader, cache: Path) -> Documents:
    paths = matching(source.path, kind=source.kind, key=key)
    return table_files(paths, kind=source.kind, reader=reader, cache=cache)


def _hf(source: SourceConfig, key: str, reader: Reader, cache: Path) -> Documents:
    return hub_dataset(source.path, name=source.name, split=source.split, reader=reader)


def _synthetic(source: SourceConfig, key: str, reader: Reader, cache: Path) -> Documents:
    return Synthetic(source.documents or SYNTHETIC_DOCUMENTS)


def _docstrings(source: SourceConfig, key: str, reader: Reader, cache: Path) -> Documents:
    found, fingerprint = library_pairs(cache)
    return Docstrings(found, reader, fingerprint)


SOURCES: dict[str, Opener] = {
    "stdlib": _stdlib,
    "text": _text,
    "jsonl": _jsonl,
    "parquet": _table,
    "arrow": _table,
    "hf": _hf,
    "synthetic": _synthetic,
    "docstrings": _docstrings,
}
