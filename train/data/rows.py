"""Rows: fixed-length arrays made of pieces of documents, and the table that says which pieces.

The input of a document is `bos, token, token, ...`; its targets are the same tokens without `bos`, closed by `eos`.
So every token of every document, `eos` included, is a target exactly once, also where a row boundary cuts the
document: the input of the second piece opens with the last token of the first. Nothing ever predicts the first token of
the *next* document from this one. Every position has weight 1 but padding, which has weight 0 and segment 0, and those
whose target is of a prompt.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .packing import PACKERS
from .store import TokenStore
from .tokenizer import Tokenizer

Row = dict[str, np.ndarray]  # tokens targets segment_ids positions int32, loss_weights float32; each [sequence]


@dataclass(frozen=True)
class RowTable:
    """Row r is made of pieces first[r] to first[r + 1]."""

    first: np.ndarray  # [rows + 1] int64
    document: np.ndarray  # [pieces] int64, into the store
    start: np.ndarray  # [pieces] int64, tokens
    length: np.ndarray  # [pieces] int64, tokens

    def __len__(self) -> int:
        return len(self.first) - 1


@dataclass(frozen=True)
class RowShape:
    """What turning pieces into arrays needs to know beside the tokens."""

    sequence_length: int
    bos: int  # token ids
    pad: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, sequence_length: int) -> "RowShape":
        return cls(sequence_length, tokenizer.bos, tokenizer.pad)


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


def row(store: TokenStore, table: RowTable, *, index: int, shape: RowShape) -> Row:
    """Row `index` of the table as arrays [sequence]."""
    result = padding(shape)
    column = 0
    for segment, piece in enumerate(range(table.first[index], table.first[index + 1]), start=1):
        length, start = table.length[piece], table.start[piece]
        here = slice(column, column + length)
        begin = store.offsets[table.document[piece]] + start
        result["targets"][here] = store.tokens[begin : begin + length]
        result["tokens"][column] = store.tokens[begin - 1] if start else shape.bos
        result["tokens"][column + 1 : column + length] = result["targets"][column : column + length - 1]
        result["positions"][here] = np.arange(length)
        result["segment_ids"][here] = segment
        result["loss_weights"][here] = start + np.arange(length) >= store.prompts[table.document[piece]]
        column += length
    return result


def padding(shape: RowShape) -> Row:
    """A row that holds nothing: segment 0, weight 0."""
    length = shape.sequence_length
    return {
        "tokens": np.full(length, shape.pad, np.int32),
        "targets": np.full(length, shape.pad, np.int32),
        "loss_weights": np.zeros(length, np.float32),
        "segment_ids": np.zeros(length, np.int32),
        "positions": np.zeros(length, np.int32),
    }
