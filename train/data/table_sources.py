"""Documents in rows of tables: JSON lines, Parquet, Arrow, and Hugging Face data sets."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from ...configs.errors import UserError, first_line
from .documents import Documents, decode_utf8, digest
from .formats import RowReader
from .text_files import map_file, split_spans


def open_json_lines(paths: list[Path], *, reader: RowReader) -> Documents:
    """One document per line of the files; blank lines do not count. A line is parsed when it is read."""
    digests = []

    def lines() -> Iterator[tuple[int, int, int, int]]:
        for file_number, path in enumerate(paths):
            content = map_file(path)
            digests.append(xxhash.xxh3_128_hexdigest(content))
            for number, (start, stop) in enumerate(split_spans(content, b"\n"), start=1):
                if content[start:stop].strip():
                    yield file_number, start, stop, number

    # [documents, 4] int64: number of the file, first byte, end, line number from 1.
    table = np.fromiter(lines(), np.dtype((np.int64, 4)))  # 32 bytes per line, because there may be very many

    def read(index: int) -> str:
        file_number, start, stop, line = table[index].tolist()
        path = paths[file_number]
        with open(path, "rb") as file:
            file.seek(start)
            raw = decode_utf8(file.read(stop - start), origin=str(path), offset=start)
        origin = f"{path} line {line}"
        try:
            row = json.loads(raw)
        except json.JSONDecodeError as error:
            raise UserError(
                f"data.path: {origin}, column {error.colno}: not JSON ({error.msg}); repair or remove the line"
            ) from None
        if not isinstance(row, dict):
            raise UserError(
                f"data.path: {origin}: {type(row).__name__} is not a JSON object; write "
                f"{{{next(iter(reader.names.values()))!r}: ...}}"
            )
        return reader.document(row, origin=origin)

    return Documents(len(table), read, digest("jsonl", reader.fingerprint, *digests))


def table_documents(rows: Any, reader: RowReader, *, origin: str, fingerprint: str) -> Documents:
    """One document per row of `rows`, a memory-mapped `datasets.Dataset`."""
    selected = select_columns(rows, reader)
    return Documents(
        len(selected), lambda index: reader.document(selected[index], origin=f"{origin} row {index}"), fingerprint
    )


def open_table_files(paths: list[Path], *, kind: str, reader: RowReader, cache: Path) -> Documents:
    """Parquet or Arrow files as one table, memory-mapped from the cache."""
    import datasets

    digests = [xxhash.xxh3_128_hexdigest(map_file(path)) for path in paths]
    try:
        rows = datasets.load_dataset(
            kind, data_files=[str(path) for path in paths], split="train", cache_dir=str(cache / "datasets")
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"data.path: {paths[0]} is not {kind}: {first_line(error)}; check data.source") from error
    fingerprint = digest(kind, reader.fingerprint, *digests)
    return table_documents(rows, reader, origin=str(paths[0].parent), fingerprint=fingerprint)


def open_hub_dataset(path: str, *, name: str | None, split: str, reader: RowReader) -> Documents:
    """A data set in a directory, or one of `datasets.load_dataset`, which is downloaded completely."""
    import datasets

    with _as_user_error(path):
        rows = _load_saved(path, split=split)
        rows = datasets.load_dataset(path, name, split=split) if rows is None else rows
    version = digest("hf", reader.fingerprint, rows._fingerprint, str(len(rows)))
    return table_documents(rows, reader, origin=path, fingerprint=version)


class HubStream(NamedTuple):
    """Documents that are read in order."""

    read: Callable[[int], Iterator[str]]  # number of documents to skip -> the documents after them
    fingerprint: str


def open_hub_stream(path: str, *, name: str | None, split: str, reader: RowReader) -> HubStream:
    """The same without downloading it first. The fingerprint has the revision on the hub, or that of local files."""
    import datasets

    with _as_user_error(path):
        if (saved := _load_saved(path, split=split)) is not None:
            rows, version = saved.to_iterable_dataset(), saved._fingerprint
        else:
            builder = datasets.load_dataset_builder(path, name)
            rows, version = builder.as_streaming_dataset(split=split), builder.hash

    def read(skip: int) -> Iterator[str]:
        for number, item in enumerate(rows.skip(skip), start=skip):
            yield reader.document(item, origin=f"{path} row {number}")

    return HubStream(read, digest("hf", path, str(name), split, reader.fingerprint, str(version)))


def select_columns(rows: Any, reader: RowReader) -> Any:
    """The table with only the columns that `reader` reads, so that no others are decoded."""
    return rows.select_columns(reader.columns(rows.column_names))


def _load_saved(path: str, *, split: str) -> Any:
    """The data set that `save_to_disk` wrote to the directory `path`, or None where there is none."""
    import datasets

    directory = Path(path).expanduser()
    if not ((directory / "dataset_dict.json").is_file() or (directory / "state.json").is_file()):
        return None
    try:
        rows = datasets.load_from_disk(str(directory))
    except IndexError:  # the library cannot open a data set without rows that it saved
        raise UserError(f"data.path: {path} has no documents; use a data set with at least one") from None
    if isinstance(rows, datasets.Dataset):
        return rows
    if split not in rows:
        raise UserError.no_match("data.split", [split], candidates=rows)
    return rows[split]


@contextmanager
def _as_user_error(path: str) -> Iterator[None]:
    """Raise errors of the datasets library as UserError."""
    import datasets

    try:
        yield
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"data.path: {path} cannot be loaded: {first_line(error)}; check data.path, data.name, data.split"
        ) from error
