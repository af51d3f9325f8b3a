"""Rows by number: the endless shuffled sequence one trains on, and the finite one that is held out.

Sample `index` of a training set is row `index mod rows` of epoch `index div rows`, so the position in the data is one
integer. Documents are dealt into windows once, by the seed; each epoch shuffles inside every window, packs it again and
visits the rows of all windows in a new order.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from .documents import Documents
from .marked_text import learned_text
from .permutation import permutation
from .rows import Row, RowShape, RowTable, build_row, padding_row, row_table
from .token_store import TokenStore

# What a permutation is for, as part of its key: equal integers elsewhere in the key must not give equal orders.
WINDOWS, DOCUMENTS, ROWS = 0, 1, 2


class Dataset(Protocol):
    """An endless sequence of rows."""

    def row(self, index: int) -> Row:
        """Sample `index` >= 0: a pure function of the data, the seed and the index."""

    def rows_per_epoch(self, epoch: int = 0) -> int:
        """Rows in one pass over the documents."""


class Packing(NamedTuple):
    """How windows become rows."""

    method: str
    window: int  # documents
    shape: RowShape

    def table(self, windows: list[np.ndarray], lengths: np.ndarray) -> RowTable:
        return row_table(windows, lengths, method=self.method, sequence_length=self.shape.sequence_length)


class ShuffledDataset:
    """Some documents of a store, in a new order every epoch."""

    def __init__(self, store: TokenStore, documents: np.ndarray, *, packing: Packing, key: tuple[int, ...]):
        """`documents` are numbers in the store; `key` holds the seed and what tells this data set from its siblings."""
        self.store, self.packing, self.key = store, packing, key
        self._lengths = store.lengths
        dealt = documents[permutation(len(documents), *key, WINDOWS)]
        self._windows = np.split(dealt, range(packing.window, len(dealt), packing.window))
        self._epoch = lru_cache(maxsize=2)(
            self._plan
        )  # two: a batch may hold the end of one epoch and the start of the next
        self._rows = len(packing.table(self._windows, self._lengths))

    def rows_per_epoch(self, epoch: int = 0) -> int:
        del epoch  # the same in each: how many rows a window fills does not depend on the order of its documents
        return self._rows

    def row(self, index: int) -> Row:
        epoch, place = divmod(index, self._rows)
        table, order = self._epoch(epoch)
        return build_row(self.store, table, index=order[place], shape=self.packing.shape)

    def _plan(self, epoch: int) -> tuple[RowTable, np.ndarray]:
        """The rows of an epoch, and the order they are visited in."""
        windows = [
            window[permutation(len(window), *self.key, DOCUMENTS, epoch, number)]
            for number, window in enumerate(self._windows)
        ]
        return self.packing.table(windows, self._lengths), permutation(self._rows, *self.key, ROWS, epoch)


@dataclass(frozen=True)
class FullBatches:
    """`dataset`, of each epoch only the rows that fill batches of `batch` <= its rows: none is in a batch twice.

    Which rows an epoch leaves out is as random as its order.
    """

    dataset: Dataset
    batch: int

    def rows_per_epoch(self, epoch: int = 0) -> int:
        rows = self.dataset.rows_per_epoch(epoch)
        return rows - rows % self.batch

    def row(self, index: int) -> Row:
        epoch, place = divmod(index, self.rows_per_epoch())
        return self.dataset.row(epoch * self.dataset.rows_per_epoch() + place)


@dataclass(frozen=True)
class HeldOutSource:
    """The held-out documents of one source: which they are in its store."""

    source: Documents
    store: TokenStore
    documents: np.ndarray  # [documents] numbers in the store


class HeldOutDataset:
    """Documents nobody trains on, in the order of their sources, packed once; rows beyond the last are padding."""

    def __init__(self, parts: list[HeldOutSource], *, packing: Packing):
        self._parts, self._shape = parts, packing.shape
        self._tables = []
        for part in parts:
            windows = np.split(part.documents, range(packing.window, len(part.documents), packing.window))
            self._tables.append(packing.table(windows, part.store.lengths))
        self._stops = np.cumsum([len(table) for table in self._tables])

    @property
    def rows(self) -> int:
        """Rows that hold documents."""
        return int(self._stops[-1])

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the documents: the denominator of bits per byte."""
        return sum(int(part.store.sizes[part.documents].sum()) for part in self._parts)

    @property
    def documents(self) -> int:
        return sum(len(part.documents) for part in self._parts)

    @property
    def tokens(self) -> int:
        """Targets with weight 1: all tokens but prompts', the end of each document included."""
        return sum(int(part.store.learned[part.documents].sum()) for part in self._parts)

    def padded_rows(self, global_batch: int) -> int:
        """`rows` rounded up to whole batches: the `stop` for `batches`."""
        return -(-self.rows // global_batch) * global_batch

    def row(self, index: int) -> Row:
        """Row `index` >= 0, padding from `rows` on."""
        part = int(np.searchsorted(self._stops, index, side="right"))
        if part == len(self._parts):
            return padding_row(self._shape)
        within = index - (self._stops[part] - len(self._tables[part]))
        return build_row(self._parts[part].store, self._tables[part], index=within, shape=self._shape)

    def questions(self, count: int) -> list[tuple[list[int], list[int]]]:
        """(what stands before, what is learned last) of the first `count` documents, as tokens; of pairs the first."""
        found = []
        for part in self._parts:
            for document in part.documents[: count - len(found)]:
                begin = part.store.offsets[document]
                tokens = part.store.tokens[begin : begin + part.store.cuts[document]].tolist()
                weights = part.store.weights(begin, begin + len(tokens))
                stop = int(np.flatnonzero(weights)[-1]) + 1
                start = int(np.max(np.flatnonzero(weights[:stop] == 0), initial=-1)) + 1
                found.append(([int(part.store.openers[document, 0]), *tokens[:start]], tokens[start:stop]))
        return found

    def texts(self) -> Iterator[str]:
        """What is learned of the documents: what another compressor would be given."""
        for part in self._parts:
            for origin in part.store.origins[part.documents]:
                yield learned_text(part.source[int(origin)])
