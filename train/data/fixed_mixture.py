"""Rows of several data sets in every batch: a fixed number of each, one data set after another.

Of batches of 3 + 1 rows, sample 4 n + 3 is row n of the second data set, and the others of batch n are rows 3 n to
3 n + 2 of the first. So each is read as in a run of its own with batches of its own rows, and the position in all of
them is one integer.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

import numpy as np

from ...configs.names import ADAPTER_IDS_FIELD
from .dataset import Dataset, HeldOutDataset
from .rows import Row

Rows = TypeVar("Rows", bound=Any)  # Dataset or HeldOut


class FixedMixture(Generic[Rows]):
    """An endless sequence of rows out of `each` data set by name, of which a batch has so many `rows`."""

    def __init__(self, datasets: Mapping[str, Rows], *, rows: Mapping[str, int]):
        self.datasets = dict(datasets)
        self._counts = [rows[name] for name in datasets]
        self._stops = np.cumsum(self._counts)

    def row(self, index: int) -> Row:
        """Sample `index` >= 0, with the number of its data set at every token."""
        batch, place = divmod(index, int(self._stops[-1]))
        number = int(np.searchsorted(self._stops, place, side="right"))
        count = self._counts[number]
        row = list(self.datasets.values())[number].row(batch * count + place - int(self._stops[number] - count))
        return row | {ADAPTER_IDS_FIELD: np.full_like(row["segment_ids"], number)}


class FixedTrainingMixture(FixedMixture[Dataset]):
    """To train on."""

    def rows_per_epoch(self, epoch: int = 0) -> int:
        """Rows of all together; how long each lasts depends on how many a batch has."""
        return sum(dataset.rows_per_epoch(epoch) for dataset in self.datasets.values())


class FixedHeldOutMixture(FixedMixture[HeldOutDataset]):
    """To evaluate on: rows beyond the last of a data set are padding."""

    @property
    def rows(self) -> int:
        """Of the batches that hold all documents, padding included."""
        return self.padded_rows(int(self._stops[-1]))

    def padded_rows(self, global_batch: int) -> int:
        """Whole batches that hold all documents of all: the `stop` for `batches`."""
        return global_batch * max(
            -(-one.rows // count) for one, count in zip(self.datasets.values(), self._counts, strict=True)
        )

    def texts(self) -> Iterator[str]:
        """What is learned of the documents of each, one data set after another."""
        for one in self.datasets.values():
            yield from one.texts()
