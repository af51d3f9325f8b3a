"""Rows: fixed-length arrays made of pieces of documents, and the table that says which pieces.

The input of a document is `bos, token, token, ...`; its targets are the same tokens without `bos`, closed by `eos`.
(A conversation has its own first token in place of `bos`, and ends as its template says.) So every token of every
document, `eos` included, is a target exactly once, also where a row boundary cuts the document: the input of the
second piece opens with the last token of the first. Nothing ever predicts the first token of the *next* document from
this one. Every position has weight 1 but padding, which has weight 0 and segment 0, and those whose target is only
read. The two texts of a pair are segments 1 and 2, or 3 and 4, ... of one row.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from .packing import PACKERS
from .token_store import TokenStore
from .tokenizer import Tokenizer

# tokens targets segment_ids positions int32, loss_weights labels float32, places int64; each [sequence]
Row = dict[str, np.ndarray]
NO_TOKEN = -1  # the place of padding


@dataclass(frozen=True)
class RowTable:
    """Row r is made of pieces first[r] to first[r + 1]."""

    first: np.ndarray  # [rows + 1] int64
    document: np.ndarray  # [pieces] int64, into the store
    start: np.ndarray  # [pieces] int64, tokens
    length: np.ndarray  # [pieces] int64, tokens

    def __len__(self) -> int:
        return len(self.first_token) - 1


@dataclass(frozen=True)
class RowShape:
    """What turning pieces into arrays needs to know beside the tokens."""

    sequence_length: int
    pad: int  # token id

    @classmethod
    def of(cls, tokenizer: Tokenizer, sequence_length: int) -> "RowShape":
        return cls(sequence_length, tokenizer.pad)


def row_table(windows: Iterable[np.ndarray], lengths: np.ndarray, *, method: str, sequence_length: int) -> RowTable:
    """Pack each window (document numbers, in order) by itself; rows follow each other window by window.

    `lengths` [documents] are the tokens of all documents of the store; `method` is one of PACKERS.
    """
    columns, per_row = [], []
    for window in windows:
        pieces = PACKERS[method](lengths[window], sequence_length)
        per_row.append(np.bincount(pieces.row))
        columns.append((window[pieces.document], pieces.start, pieces.length))
    if not columns:
        return RowTable(np.zeros(1, np.int64), *(np.zeros(0, np.int64) for _ in range(3)))
    first = np.cumsum(np.concatenate([[0], *per_row]))
    return RowTable(first, *(np.concatenate(column) for column in zip(*columns, strict=True)))


def build_row(store: TokenStore, table: RowTable, *, index: int, shape: RowShape) -> Row:
    """Row `index` of the table as arrays [sequence]."""
    result = padding_row(shape)
    column = segment = 0
    for piece in range(table.first_token[index], table.first_token[index + 1]):
        document = table.document[piece]
        for start, stop, opener in segments(store, document, start=table.start[piece], length=table.length[piece]):
            segment += 1
            here = slice(column, column + stop - start)
            begin, end = store.offsets[document] + start, store.offsets[document] + stop
            result["targets"][here] = store.tokens[begin:end]
            result["tokens"][column] = opener
            result["tokens"][column + 1 : here.stop] = result["targets"][column : here.stop - 1]
            result["positions"][here] = np.arange(stop - start)
            result["segment_ids"][here] = segment
            result["loss_weights"][here] = store.weights(begin, end)
            result["labels"][here] = store.labels[document]
            result["places"][here] = store.first_token + np.arange(begin, end)
            column = here.stop
    return result


def segments(store: TokenStore, document: int, *, start: int, length: int) -> Iterator[tuple[int, int, int]]:
    """(first token, end, what the first is predicted from) of the one or two segments in a piece of a document."""
    cut, stop = store.cuts[document], start + length
    if start < cut:
        before = store.tokens[store.offsets[document] + start - 1] if start else store.openers[document, 0]
        yield start, min(stop, cut), before
    if cut < stop:  # pairs are never cut
        yield cut, stop, store.openers[document, 1]


def padding_row(shape: RowShape) -> Row:
    """A row that holds nothing: segment 0, weight 0."""
    length = shape.sequence_length
    return {
        "tokens": np.full(length, shape.pad, np.int32),
        "targets": np.full(length, shape.pad, np.int32),
        "loss_weights": np.zeros(length, np.float32),
        "segment_ids": np.zeros(length, np.int32),
        "positions": np.zeros(length, np.int32),
        "labels": np.zeros(length, np.float32),
        "places": np.full(length, NO_TOKEN, np.int64),
    }
