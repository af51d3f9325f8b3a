"""Rows: arrays of fixed length made of slices of documents, and the table of these slices.

The input of a document is `bos, token, token, ...`; its targets are the same tokens without `bos`, closed by `eos`. (A
conversation has its own first token in place of `bos`, and ends as its template says.) So every token of every
document, `eos` included, is a target exactly once, also where a row boundary cuts the document: the input of the second
slice starts with the last token of the first. No token predicts the first token of the *next* document. The field
`loss_weights` is the loss mask of the documents: 1, and 0 for targets of prompts. Padding has weight 0 and segment 0.
The two texts of a pair are segments 1 and 2, or 3 and 4, ... of one row.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from .packing import PACKERS
from .token_store import TokenStore
from .tokenizer import Tokenizer

# tokens targets segment_ids positions int32, loss_weights labels float32, token_index int64; each [sequence]
Row = dict[str, np.ndarray]
NO_TOKEN = -1  # the token index of padding


@dataclass(frozen=True)
class RowTable:
    """Row r consists of slices first[r] to first[r + 1]."""

    first: np.ndarray  # [rows + 1] int64
    document: np.ndarray  # [slices] int64: number in the store
    start: np.ndarray  # [slices] int64, tokens
    length: np.ndarray  # [slices] int64, tokens

    def __len__(self) -> int:
        return len(self.first) - 1


@dataclass(frozen=True)
class RowShape:
    """The length of rows, and the token that pads them."""

    sequence_length: int
    pad: int  # token id

    @classmethod
    def of(cls, tokenizer: Tokenizer, sequence_length: int) -> "RowShape":
        return cls(sequence_length, tokenizer.pad)


def row_table(windows: Iterable[np.ndarray], lengths: np.ndarray, *, method: str, sequence_length: int) -> RowTable:
    """Pack each window (document numbers in order) by itself; the rows of the windows follow each other.

    `lengths` [documents] are those of all documents of the store in tokens; `method` is a name in PACKERS.
    """
    columns, per_row = [], []
    for window in windows:
        slices = PACKERS[method](lengths[window], sequence_length)
        per_row.append(np.bincount(slices.row))
        columns.append((window[slices.document], slices.start, slices.length))
    if not columns:
        return RowTable(np.zeros(1, np.int64), *(np.zeros(0, np.int64) for _ in range(3)))
    first = np.cumsum(np.concatenate([[0], *per_row]))
    return RowTable(first, *(np.concatenate(column) for column in zip(*columns, strict=True)))


def build_row(store: TokenStore, table: RowTable, *, index: int, shape: RowShape) -> Row:
    """Row `index` of the table as arrays [sequence]."""
    result = padding_row(shape)
    column = segment = 0
    for number in range(table.first[index], table.first[index + 1]):
        document = table.document[number]
        for start, stop, opener in segments(store, document, start=table.start[number], length=table.length[number]):
            segment += 1
            span = slice(column, column + stop - start)
            begin, end = store.offsets[document] + start, store.offsets[document] + stop
            result["targets"][span] = store.tokens[begin:end]
            result["tokens"][column] = opener
            result["tokens"][column + 1 : span.stop] = result["targets"][column : span.stop - 1]
            result["positions"][span] = np.arange(stop - start)
            result["segment_ids"][span] = segment
            result["loss_weights"][span] = store.loss_mask(begin, end)
            result["labels"][span] = store.labels[document]
            result["token_index"][span] = store.first_token + np.arange(begin, end)
            column = span.stop
    return result


def segments(store: TokenStore, document: int, *, start: int, length: int) -> Iterator[tuple[int, int, int]]:
    """(first token, end, opener) of the one or two segments in a slice of a document."""
    boundary, stop = store.cuts[document], start + length
    if start < boundary:
        opener = store.tokens[store.offsets[document] + start - 1] if start else store.openers[document, 0]
        yield start, min(stop, boundary), opener
    if boundary < stop:  # pairs are never cut
        yield boundary, stop, store.openers[document, 1]


def padding_row(shape: RowShape) -> Row:
    """A row without documents: segment 0, weight 0."""
    length = shape.sequence_length
    return {
        "tokens": np.full(length, shape.pad, np.int32),
        "targets": np.full(length, shape.pad, np.int32),
        "loss_weights": np.zeros(length, np.float32),
        "segment_ids": np.zeros(length, np.int32),
        "positions": np.zeros(length, np.int32),
        "labels": np.zeros(length, np.float32),
        "token_index": np.full(length, NO_TOKEN, np.int64),
    }
