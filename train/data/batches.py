"""Batches in the background: consecutive rows of a data set, this process's share of each global batch.

Global batch b holds samples `start + b * global_batch` onwards. A process reads a slice of each, so any number of
processes together read the same samples, and to resume is to start at the index that was reached.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ...configs.errors import UserError
from .rows import Row


class RowSource(Protocol):
    """A training set, endless, or a held-out one."""

    def row(self, index: int) -> Row: ...


@dataclass(frozen=True)
class _Batches:
    """Batch by number: what the prefetching library reads from."""

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

    `rows` is this process's slice of each global batch (default: all of it); `stop` is the sample to end before
    (default: never), a whole number of batches away. What goes wrong in the background is raised here. Closing the
    iterator ends the background thread. Raises UserError on an empty slice or a part of a batch.
    """
    offsets = range(global_batch)[rows]
    if not offsets:
        raise UserError(
            f"data.global_batch: {global_batch} has no rows {rows.start} to {rows.stop}; use fewer processes"
        )
    if stop is not None and (stop - start) % global_batch:
        raise UserError(f"data.global_batch: {global_batch} does not divide the {stop - start} samples asked for")
    count = sys.maxsize if stop is None else (stop - start) // global_batch
    return _prefetched(_Batches(dataset, start, global_batch, offsets, count), prefetch)


def _prefetched(source: _Batches, prefetch: int) -> Iterator[Row]:
    import grain

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
    iterator = iter(grain.MapDataset.source(source).to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()
