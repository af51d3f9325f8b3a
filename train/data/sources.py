"""The table of sources: `data.source` -> a function that opens its documents."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from ...configs.errors import UserError
from ...configs.sections.data import SourceConfig
from .chat import Template
from .docstrings import docstring_documents
from .documents import Documents, digest
from .formats import RowReader, make_reader, pair_mismatched
from .source_paths import match_files
from .streaming_source import DocumentStream
from .synthetic import synthetic_documents
from .table_sources import open_hub_dataset, open_hub_stream, open_json_lines, open_table_files
from .text_files import open_standard_library, open_text_files

SYNTHETIC_DOCUMENTS = 1000

# (settings, their key in the configuration, reader of rows, cache directory) -> documents
Opener = Callable[[SourceConfig, str, RowReader, Path], Documents]


def open_source(source: SourceConfig, *, key: str, cache: Path, template: Template | None = None) -> Documents:
    """The documents of one source. Raises UserError where there are none."""
    documents = SOURCES[source.kind](source, key, make_reader(source, template), cache)
    if source.documents is not None:
        fingerprint = digest("first", str(source.documents), documents.fingerprint)
        documents = Documents(min(source.documents, len(documents)), documents.read, fingerprint)
    if not len(documents):
        raise UserError(f"{key}.path: {source.path} has no documents; use a source with at least one")
    if source.format == "unpaired":
        if len(documents) < 2:
            raise UserError(f"{key}.path: {source.path} has one example; format unpaired needs two or more")
        return pair_mismatched(documents)
    return documents


def open_stream(source: SourceConfig, *, window: int, cache: Path, template: Template | None = None) -> DocumentStream:
    """The documents of an hf source, read when they are needed. Raises UserError where the source does not exist."""
    stream = open_hub_stream(source.path, name=source.name, split=source.split, reader=make_reader(source, template))

    def read(skip: int) -> Iterator[str]:
        stop = None if source.documents is None else max(source.documents - skip, 0)
        return islice(stream.read(skip), stop)

    return DocumentStream(read, size=window, fingerprint=digest(stream.fingerprint, str(source.documents)), cache=cache)


def _stdlib(source: SourceConfig, key: str, reader: RowReader, cache: Path) -> Documents:
    return open_standard_library()[1]


def _text(source: SourceConfig, key: str, reader: RowReader, cache: Path) -> Documents:
    return open_text_files(match_files(source.path, kind=source.kind, key=key), separator=source.separator)


def _jsonl(source: SourceConfig, key: str, reader: RowReader, cache: Path) -> Documents:
    return open_json_lines(match_files(source.path, kind=source.kind, key=key), reader=reader)


def _table(source: SourceConfig, key: str, reader: RowReader, cache: Path) -> Documents:
    paths = match_files(source.path, kind=source.kind, key=key)
    return open_table_files(paths, kind=source.kind, reader=reader, cache=cache)


def _hf(source: SourceConfig, key: str, reader: RowReader, cache: Path) -> Documents:
    return open_hub_dataset(source.path, name=source.name, split=source.split, reader=reader)


def _synthetic(source: SourceConfig, key: str, reader: RowReader, cache: Path) -> Documents:
    return synthetic_documents(source.documents or SYNTHETIC_DOCUMENTS)


def _docstrings(source: SourceConfig, key: str, reader: RowReader, cache: Path) -> Documents:
    return docstring_documents(reader, cache=cache)


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
