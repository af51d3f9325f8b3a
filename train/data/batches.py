"""Batches of consecutive rows, prepared in the background: the rows of this process in each global batch.

Global batch b has the samples from `start + b * global_batch` on. Each process reads a slice of it, so any number of
processes read the same samples together, and a resumed run starts at the index that was reached.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ...configs.errors import UserError
from .rows import Row


class RowSource(Protocol):
    """An endless training set, or a held-out one."""

    def row(self, index: int) -> Row: ...


@dataclass(frozen=True)
class _Batches:
    """The batches by number, as the prefetching library reads them."""

    dataset: RowSource
    start: int
    global_batch: int
    rows: range
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, batch: int) -> Row:
        first = self.start + batch * self.global_batch
        rows = [self.dataset.row(first + offset) for offset in self.rows]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def batches(
    dataset: RowSource,
    *,
    start: int,
    global_batch: int,
    rows: slice = slice(None),
    prefetch: int,
    stop: int | None = None,
) -> Iterator[Row]:
    """Batches of `dataset` from sample `start` on, each field [rows in the slice, sequence]; `prefetch` are made ahead.

    `rows` is the slice of each global batch that this process reads; `stop` is the sample to end before, a whole number
    of batches after `start` (None: never). An error in the background is raised here. Closing the iterator ends the
    background thread. Raises UserError for an empty slice or an incomplete batch.
    """
    offsets = range(global_batch)[rows]
    if not offsets:
        raise UserError(
            f"data.global_batch: {global_batch} has no rows {rows.start} to {rows.stop}; raise it, or use fewer "
            "processes"
        )
    if stop is not None and (stop - start) % global_batch:
        raise UserError(f"data.global_batch: {global_batch} does not divide {stop - start} samples; use a divisor")
    count = sys.maxsize if stop is None else (stop - start) // global_batch
    return _prefetch(_Batches(dataset, start, global_batch, offsets, count), prefetch)


def _prefetch(source: _Batches, prefetch: int) -> Iterator[Row]:
    import grain

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
    iterator = iter(grain.MapDataset.source(source).to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()
