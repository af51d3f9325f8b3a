"""Data sets of rows by number: the endless shuffled training set, and the finite held-out set.

Sample `index` of a training set is row `index mod rows` of epoch `index div rows`, so the position in the data is one
integer. The seed assigns documents to windows once; each epoch shuffles every window, packs it again, and visits the
rows of all windows in a new order.
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

# The use of a permutation is a part of its key, so that equal integers in the rest of the key give different orders.
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
    """Documents of a store in a new order every epoch."""

    def __init__(self, store: TokenStore, documents: np.ndarray, *, packing: Packing, key: tuple[int, ...]):
        """`documents` are numbers in the store; `key` has the seed and the number of this data set."""
        self.store, self.packing, self.key = store, packing, key
        self._lengths = store.lengths
        shuffled = documents[permutation(len(documents), *key, WINDOWS)]
        self._windows = np.split(shuffled, range(packing.window, len(shuffled), packing.window))
        # Two, because a batch may contain the end of one epoch and the start of the next.
        self._epoch = lru_cache(maxsize=2)(self._plan)
        self._rows = len(packing.table(self._windows, self._lengths))

    def rows_per_epoch(self, epoch: int = 0) -> int:
        del epoch  # all are equal: the number of rows of a window does not depend on the order of its documents
        return self._rows

    def row(self, index: int) -> Row:
        epoch, position = divmod(index, self._rows)
        table, order = self._epoch(epoch)
        return build_row(self.store, table, index=order[position], shape=self.packing.shape)

    def _plan(self, epoch: int) -> tuple[RowTable, np.ndarray]:
        """The rows of an epoch, and the order in which they are visited."""
        windows = [
            window[permutation(len(window), *self.key, DOCUMENTS, epoch, number)]
            for number, window in enumerate(self._windows)
        ]
        return self.packing.table(windows, self._lengths), permutation(self._rows, *self.key, ROWS, epoch)


@dataclass(frozen=True)
class FullBatches:
    """`dataset` with a multiple of `batch` rows per epoch, so that no row is in a batch twice.

    The rows that an epoch leaves out are as random as its order. `batch` must not exceed the rows of `dataset`.
    """

    dataset: Dataset
    batch: int

    def rows_per_epoch(self, epoch: int = 0) -> int:
        rows = self.dataset.rows_per_epoch(epoch)
        return rows - rows % self.batch

    def row(self, index: int) -> Row:
        epoch, position = divmod(index, self.rows_per_epoch())
        return self.dataset.row(epoch * self.dataset.rows_per_epoch() + position)


@dataclass(frozen=True)
class HeldOutSource:
    """The held-out documents of one source."""

    source: Documents
    store: TokenStore
    documents: np.ndarray  # [documents] numbers in the store


class HeldOutDataset:
    """The held-out documents in the order of their sources, packed once; rows after the last are padding."""

    def __init__(self, parts: list[HeldOutSource], *, packing: Packing):
        self._parts, self._shape = parts, packing.shape
        self._tables = []
        for part in parts:
            windows = np.split(part.documents, range(packing.window, len(part.documents), packing.window))
            self._tables.append(packing.table(windows, part.store.lengths))
        self._stops = np.cumsum([len(table) for table in self._tables])

    @property
    def rows(self) -> int:
        """How many rows hold documents."""
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
        """How many targets have weight 1: all tokens but those of prompts, with the end of each document."""
        return sum(int(part.store.learned[part.documents].sum()) for part in self._parts)

    def padded_rows(self, global_batch: int) -> int:
        """`rows` rounded up to whole batches: the `stop` for `batches`."""
        return -(-self.rows // global_batch) * global_batch

    def row(self, index: int) -> Row:
        """Row `index` >= 0; padding from `rows` on."""
        part = int(np.searchsorted(self._stops, index, side="right"))
        if part == len(self._parts):
            return padding_row(self._shape)
        within = index - (self._stops[part] - len(self._tables[part]))
        return build_row(self._parts[part].store, self._tables[part], index=within, shape=self._shape)

    def questions(self, count: int) -> list[tuple[list[int], list[int]]]:
        """(prompt, last learned answer) of the first `count` documents, as token ids; of pairs, the first answer."""
        questions = []
        for part in self._parts:
            for document in part.documents[: count - len(questions)]:
                begin = part.store.offsets[document]
                tokens = part.store.tokens[begin : begin + part.store.cuts[document]].tolist()
                weights = part.store.loss_mask(begin, begin + len(tokens))
                stop = int(np.flatnonzero(weights)[-1]) + 1
                start = int(np.max(np.flatnonzero(weights[:stop] == 0), initial=-1)) + 1
                questions.append(([int(part.store.openers[document, 0]), *tokens[:start]], tokens[start:stop]))
        return questions

    def texts(self) -> Iterator[str]:
        """The learned text of each document, e.g. as the input of another compressor."""
        for part in self._parts:
            for origin in part.store.origins[part.documents]:
                yield learned_text(part.source[int(origin)])
