"""Packing: three ways to put the documents of one window into rows of a fixed number of tokens.

A packer is `(lengths [documents], sequence_length) -> DocumentSlices`. Every token of every document is in exactly one
slice; slices of a row do not overlap; only rows that are not full are padded. A packer knows lengths, not tokens. The
number of rows does not depend on the order of the documents, so that the epoch of a row is a division.
"""

from bisect import bisect_left, insort
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class DocumentSlices(NamedTuple):
    """Slices of documents, sorted by row, and in a row by position. Arrays [slices] int64."""

    row: np.ndarray
    document: np.ndarray
    start: np.ndarray  # first token, counted from the start of the document
    length: np.ndarray  # tokens, at least 1


def concat(lengths: np.ndarray, sequence_length: int) -> DocumentSlices:
    """Concatenate the documents and cut every `sequence_length` tokens; the last row is padded.

    >>> concat(np.array([3, 4]), 5).length.tolist()      # 3 + 2 fill the first row, 2 start the second
    [3, 2, 2]
    """
    stop = np.cumsum(lengths)
    begin = stop - lengths
    first_row = begin // sequence_length
    rows = (stop - 1) // sequence_length - first_row + 1  # [documents]
    document = np.repeat(np.arange(len(lengths)), rows)
    nth = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)  # slice of its document
    row = first_row[document] + nth
    start = np.maximum(begin[document], row * sequence_length)
    end = np.minimum(stop[document], (row + 1) * sequence_length)
    return DocumentSlices(row, document, start - begin[document], end - start)


def best_fit(lengths: np.ndarray, sequence_length: int) -> DocumentSlices:
    """Cut whole rows off long documents, then put each rest, longest first, into the fullest row that it fits.

    Source: best-fit decreasing as in "Fewer Truncations Improve Language Modeling", arXiv:2404.10830.

    >>> best_fit(np.array([3, 4, 2, 1]), 5).row.tolist()      # 4 + 1 and 3 + 2
    [0, 0, 1, 1]
    """
    full, rest = np.divmod(lengths, sequence_length)
    document = np.repeat(np.arange(len(lengths)), full)
    nth = np.arange(full.sum()) - np.repeat(np.cumsum(full) - full, full)
    longest_first = np.argsort(-rest, kind="stable")
    longest_first = longest_first[rest[longest_first] > 0]
    rows = best_fit_rows(rest[longest_first].tolist(), sequence_length)
    row = np.concatenate([np.arange(len(document)), np.array(rows, np.int64) + len(document)])
    start = np.concatenate([nth * sequence_length, (full * sequence_length)[longest_first]])
    length = np.concatenate([np.full(len(document), sequence_length), rest[longest_first]])
    document = np.concatenate([document, longest_first])
    by_row = np.argsort(row, kind="stable")
    return DocumentSlices(row[by_row], document[by_row], start[by_row], length[by_row])


def best_fit_rows(lengths: list[int], capacity: int) -> list[int]:
    """The row of each item: the open row with the least space that still fits it, else a new row.

    >>> best_fit_rows([4, 3, 2, 1], 5)
    [0, 1, 1, 0]
    """
    rows, count = [], 0
    free: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for length in lengths:
        index = bisect_left(free, (length, -1))
        if index < len(free):
            space, row = free.pop(index)
        else:
            space, row = capacity, count
            count += 1
        rows.append(row)
        if space > length:
            insort(free, (space - length, row))
    return rows


def single(lengths: np.ndarray, sequence_length: int) -> DocumentSlices:
    """A row has one document, or a slice of one; short rows are padded.

    >>> single(np.array([3, 7]), 5).length.tolist()
    [3, 5, 2]
    """
    rows = -(-lengths // sequence_length)
    document = np.repeat(np.arange(len(lengths)), rows)
    start = (np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)) * sequence_length
    length = np.minimum(lengths[document] - start, sequence_length)
    return DocumentSlices(np.arange(len(document)), document, start, length)


PACKERS: dict[str, Callable[[np.ndarray, int], DocumentSlices]] = {
    "concat": concat,
    "best-fit": best_fit,
    "single": single,
}
