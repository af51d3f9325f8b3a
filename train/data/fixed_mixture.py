"""A fixed mixture: every batch has a fixed number of rows of each data set, one data set after another.

In batches of 3 + 1 rows, sample 4 n + 3 is row n of the second data set, and the other samples of batch n are rows 3 n
to 3 n + 2 of the first. So each data set is read as in a run of its own, and the position in all of them is one
integer.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

import numpy as np

from ...configs.names import ADAPTER_IDS_FIELD
from .dataset import Dataset, HeldOutDataset
from .rows import Row

Rows = TypeVar("Rows", bound=Any)  # Dataset or HeldOutDataset


class FixedMixture(Generic[Rows]):
    """An endless sequence of rows of several data sets by name; `rows` is the number of each in a batch."""

    def __init__(self, datasets: Mapping[str, Rows], *, rows: Mapping[str, int]):
        self.datasets = dict(datasets)
        self._counts = [rows[name] for name in datasets]
        self._stops = np.cumsum(self._counts)

    def row(self, index: int) -> Row:
        """Sample `index` >= 0, with the number of its data set at every token."""
        batch, position = divmod(index, int(self._stops[-1]))
        number = int(np.searchsorted(self._stops, position, side="right"))
        count = self._counts[number]
        row = list(self.datasets.values())[number].row(batch * count + position - int(self._stops[number] - count))
        return row | {ADAPTER_IDS_FIELD: np.full_like(row["segment_ids"], number)}


class FixedTrainingMixture(FixedMixture[Dataset]):
    """The mixture of several training sets."""

    def rows_per_epoch(self, epoch: int = 0) -> int:
        """Rows of all data sets; their epochs end at different samples."""
        return sum(dataset.rows_per_epoch(epoch) for dataset in self.datasets.values())


class FixedHeldOutMixture(FixedMixture[HeldOutDataset]):
    """The mixture of several held-out sets; rows after the last of a data set are padding."""

    @property
    def rows(self) -> int:
        """Rows of the batches that hold all documents, with padding."""
        return self.padded_rows(int(self._stops[-1]))

    def padded_rows(self, global_batch: int) -> int:
        """Rows of the whole batches that hold all documents: the `stop` for `batches`."""
        return global_batch * max(
            -(-dataset.rows // count) for dataset, count in zip(self.datasets.values(), self._counts, strict=True)
        )

    def texts(self) -> Iterator[str]:
        """The learned text of each document, one data set after another."""
        for dataset in self.datasets.values():
            yield from dataset.texts()
