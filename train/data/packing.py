"""How documents fill rows: three ways to place the documents of one window into rows of a fixed number of tokens.

A packer is `(lengths [documents], sequence_length) -> Pieces`. Every token of every document lies in exactly one piece;
pieces of a row do not overlap; only the rows that end up short are padded. It knows lengths, not tokens, and the number
of rows does not depend on the order of the documents: the place of a row in training is then a division away.
"""

from bisect import bisect_left, insort
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class DocumentSlices(NamedTuple):
    """Parts of documents, sorted by row; within a row in the order they are laid out. Arrays [pieces] int64."""

    row: np.ndarray
    document: np.ndarray
    start: np.ndarray  # first token, counted from the document's beginning
    length: np.ndarray  # tokens, at least 1


def concat(lengths: np.ndarray, sequence_length: int) -> DocumentSlices:
    """Lay the documents end to end and cut every `sequence_length` tokens; the last row is padded.

    >>> concat(np.array([3, 4]), 5).length.tolist()      # 3 + 2 fill the first row, 2 begin the second
    [3, 2, 2]
    """
    stop = np.cumsum(lengths)
    begin = stop - lengths
    first_row = begin // sequence_length
    pieces = (stop - 1) // sequence_length - first_row + 1  # [documents]
    document = np.repeat(np.arange(len(lengths)), pieces)
    nth = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # of its document
    row = first_row[document] + nth
    left = np.maximum(begin[document], row * sequence_length)
    right = np.minimum(stop[document], (row + 1) * sequence_length)
    return DocumentSlices(row, document, left - begin[document], right - left)


def best_fit(lengths: np.ndarray, sequence_length: int) -> DocumentSlices:
    """Cut rows off documents longer than a row, then put each rest, longest first, where it leaves least room.

    Source: best-fit decreasing as in "Fewer Truncations Improve Language Modeling", arXiv:2404.10830.

    >>> best_fit(np.array([3, 4, 2, 1]), 5).row.tolist()      # 4 + 1 and 3 + 2
    [0, 0, 1, 1]
    """
    whole, rest = np.divmod(lengths, sequence_length)
    document = np.repeat(np.arange(len(lengths)), whole)
    nth = np.arange(whole.sum()) - np.repeat(np.cumsum(whole) - whole, whole)
    longest_first = np.argsort(-rest, kind="stable")
    longest_first = longest_first[rest[longest_first] > 0]
    rows = best_fit_rows(rest[longest_first].tolist(), sequence_length)
    row = np.concatenate([np.arange(len(document)), np.array(rows, np.int64) + len(document)])
    start = np.concatenate([nth * sequence_length, (whole * sequence_length)[longest_first]])
    length = np.concatenate([np.full(len(document), sequence_length), rest[longest_first]])
    document = np.concatenate([document, longest_first])
    by_row = np.argsort(row, kind="stable")
    return DocumentSlices(row[by_row], document[by_row], start[by_row], length[by_row])


def best_fit_rows(lengths: list[int], capacity: int) -> list[int]:
    """The row of each item: the open row with the least room that still holds it, else a new one.

    >>> best_fit_rows([4, 3, 2, 1], 5)
    [0, 1, 1, 0]
    """
    rows, opened = [], 0
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for length in lengths:
        place = bisect_left(room, (length, -1))
        if place < len(room):
            left, row = room.pop(place)
        else:
            left, row = capacity, opened
            opened += 1
        rows.append(row)
        if left > length:
            insort(room, (left - length, row))
    return rows


def single(lengths: np.ndarray, sequence_length: int) -> DocumentSlices:
    """A row holds one document, or a part of one; what is short is padded.

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
