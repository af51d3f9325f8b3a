"""A weighted mixture: every block of rows has an exact number of rows of each data set, shuffled within the block.

The source and the row of sample `index` are pure functions of (seed, index): the position in the mixture is one
integer, and every source has its own epochs. Source: block-deterministic mixtures, as in Levanter.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ...configs.errors import UserError
from .dataset import Dataset
from .permutation import permutation
from .rows import Row

BLOCK = 2048  # rows; weights are exact to 1 / BLOCK


class Mixture:
    """An endless sequence of rows of several data sets."""

    def __init__(self, datasets: Sequence[Dataset], *, weights: Sequence[float], key: tuple[int, ...]):
        self._datasets, self._key = tuple(datasets), key
        self._counts = block_counts(weights)
        self._block = lru_cache(maxsize=2)(self._shuffle_block)

    def rows_per_epoch(self, epoch: int = 0) -> int:
        """Rows of all data sets; their epochs end at different samples."""
        return sum(dataset.rows_per_epoch(epoch) for dataset in self._datasets)

    def row(self, index: int) -> Row:
        source, within = self.locate(index)
        return self._datasets[source].row(within)

    def locate(self, index: int) -> tuple[int, int]:
        """(source, index in that source) of sample `index`."""
        block, offset = divmod(index, BLOCK)
        sources, nth = self._block(block)
        source = int(sources[offset])
        return source, block * int(self._counts[source]) + int(nth[offset])

    def _shuffle_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(source of each row of a block, number of earlier rows of that source in the block)."""
        sources = np.repeat(np.arange(len(self._counts)), self._counts)[permutation(BLOCK, *self._key, block)]
        nth = np.empty(BLOCK, np.int64)
        for source, count in enumerate(self._counts):
            nth[sources == source] = np.arange(count)
        return sources, nth


def block_counts(weights: Sequence[float], *, block: int = BLOCK) -> np.ndarray:
    """[sources] int64: rows of each in a block, proportional to the weights, by largest remainder.

    Raises UserError where a weight is too small for one row.

    >>> block_counts([3, 1], block=10).tolist()
    [8, 2]
    """
    exact = np.asarray(weights, np.float64) / np.sum(weights) * block
    counts = np.floor(exact).astype(np.int64)
    largest = np.argsort(-(exact - counts), kind="stable")[: block - counts.sum()]
    counts[largest] += 1
    for number in np.flatnonzero(counts == 0):
        raise UserError(
            f"data.mixture.{number}.weight: {weights[number]} is less than 1/{block} of the sum {np.sum(weights):g}, "
            "the smallest possible share; raise it, or remove the source"
        )
    return counts
